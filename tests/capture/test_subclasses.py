"""Tensor subclasses that come apart by PyTorch's protocol are stored, and put together again."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from unbroken import Checkpointer
from unbroken.capture import capture, encode
from unbroken.errors import CaptureError, StateMismatchError


class Halves(torch.Tensor):
    """A tensor kept as integers and one scale, as 8-bit optimizers keep their moments."""

    @staticmethod
    def __new__(cls, codes, scale, bits):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale, bits):
        self.codes, self.scale, self.bits = codes, scale, bits

    def __tensor_flatten__(self):
        return ["codes", "scale"], [self.bits]

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size=None, stride=None):
        return cls(parts["codes"], parts["scale"], *context)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.aten.detach.default:
            one = arguments[0]
            return cls(one.codes, one.scale, one.bits)
        raise NotImplementedError(function)


def halves(seed: int = 0, bits: int = 8) -> Halves:
    torch.manual_seed(seed)
    return Halves(torch.randint(0, 255, (4, 4), dtype=torch.uint8), torch.rand(()), bits)


class Rounded(torch.optim.SGD):
    """Keeps a moment of each parameter as `Halves`, from its first step on."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            seed = len(self.state[parameter].get("seen", ()))
            seen = [*self.state[parameter].get("seen", ()), seed]
            self.state[parameter] = {"moment": halves(seed), "seen": seen}


def test_the_state_of_an_optimizer_comes_back_before_its_first_step(tmp_path):
    model = nn.Linear(4, 4)
    optimizer = Rounded(model.parameters(), lr=0.1)
    optimizer.step()
    optimizer.step()
    with Checkpointer(tmp_path, model=model, optimizer=optimizer) as checkpointer:
        checkpointer.save(2)
    fresh = Rounded(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path, model=model, optimizer=fresh) as checkpointer:
        assert checkpointer.resume().verdict == "exact"
    moments = [one.state[model.weight]["moment"] for one in (fresh, optimizer)]
    assert type(moments[0]) is Halves
    assert moments[0].bits == 8
    assert torch.equal(moments[0].codes, moments[1].codes)
    assert torch.equal(moments[0].scale, moments[1].scale)


def quantized(seed: int, bits: int = 8) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(halves(seed, bits), requires_grad=False)
    module.tied = module.weight
    return module


def test_a_parameter_is_filled_where_it_is(tmp_path):
    with Checkpointer(tmp_path, model=quantized(1)) as checkpointer:
        checkpointer.save(1)
    model = quantized(2)
    codes = model.weight.codes
    with Checkpointer(tmp_path, model=model) as checkpointer:
        checkpointer.resume()
    assert model.weight.codes is codes
    assert torch.equal(codes, halves(1).codes)
    assert model.tied is model.weight


def test_one_that_is_made_in_another_way_does_not_fit(tmp_path):
    with Checkpointer(tmp_path, model=quantized(1)) as checkpointer:
        checkpointer.save(1)
    refusal = pytest.raises(StateMismatchError, match=r"model\.weight: is made in another way")
    with Checkpointer(tmp_path, model=quantized(1, bits=4)) as checkpointer, refusal:
        checkpointer.resume()


def test_no_class_is_looked_up_by_the_name_in_a_file(tmp_path):
    with Checkpointer(tmp_path, moment=halves()) as checkpointer:
        checkpointer.save(1)
    other = torch.zeros(4, 4)
    refusal = pytest.raises(StateMismatchError, match="is of another class")
    with Checkpointer(tmp_path, moment=other) as checkpointer, refusal:
        checkpointer.resume()


def test_what_makes_it_besides_tensors_must_be_plain():
    with pytest.raises(CaptureError, match=r"moment:context\.0: cannot be stored"):
        encode(capture({"moment": halves(bits=object())}))


def test_a_subclass_that_does_not_come_apart_is_refused_by_its_name():
    class Opaque(torch.Tensor):
        pass

    with pytest.raises(CaptureError, match=re.escape("Opaque")):
        encode(capture({"moment": torch.ones(2).as_subclass(Opaque)}))


def test_the_structure_is_plain_json():
    node = encode(capture({"moment": halves()})).structure["moment"]["state"]
    assert json.loads(json.dumps(node)) == node
    assert node["type"].endswith("Halves")
    assert node["parts"]["codes"]["leaf"] == "moment.codes"
