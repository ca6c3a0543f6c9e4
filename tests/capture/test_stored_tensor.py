"""A stored tensor reads its bytes when asked to, once, to where they belong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from capture.round_trip import loaded, saved, stored
from capture.tree_equality import account
from unbroken.capture import restore
from unbroken.errors import StateMismatchError


class Watched:
    """A reader that remembers where it was asked to put the bytes."""

    def __init__(self, reader):
        self.reader, self.manifest, self.buffers = reader, reader.manifest, []

    def read_file(self, name):
        return self.reader.read_file(name)

    def read_leaf_into(self, path, buffer):
        self.buffers.append((path, torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()))
        self.reader.read_leaf_into(path, buffer)


def lazy(tensor):
    watched = Watched(stored({"x": tensor}))
    return loaded(watched, lazy=True)["x"], watched


def test_nothing_is_read_before_it_is_asked_for():
    tensor, watched = lazy(torch.rand(4))
    assert (tensor.dtype, tensor.shape, str(tensor)) == (torch.float32, (4,), "float32[4]")
    assert watched.buffers == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_contiguous_tensor_is_read_straight_into_its_memory(dtype):
    source, target = torch.rand(4, 3).to(dtype), torch.zeros(4, 3, dtype=dtype)
    tensor, watched = lazy(source)
    tensor.copy_into(target)
    assert watched.buffers == [("x", target.data_ptr())]
    assert account(target) == account(source)


@pytest.mark.parametrize(
    "target", [torch.zeros(4, 6)[:, ::2], torch.zeros(3, 4).t()], ids=["with holes", "transposed"]
)
def test_any_other_tensor_is_filled_through_a_buffer(target):
    source = torch.rand(4, 3)
    tensor, watched = lazy(source)
    tensor.copy_into(target)
    assert len(watched.buffers) == 1
    assert torch.equal(target.contiguous().view(torch.int32), source.view(torch.int32))


def test_a_conjugated_view_is_copied_as_what_it_shows():
    source, target = (
        torch.rand(3, dtype=torch.complex64).conj(),
        torch.zeros(3, dtype=torch.complex64),
    )
    lazy(source)[0].copy_into(target)
    assert account(target) == account(source.resolve_conj())


@pytest.mark.parametrize("target", [torch.zeros(5), torch.zeros(4, dtype=torch.half)], ids=repr)
def test_a_tensor_that_does_not_fit_is_left_alone(target):
    tensor, watched = lazy(torch.rand(4))
    with pytest.raises(StateMismatchError, match=r"x: has another shape or dtype"):
        tensor.copy_into(target)
    assert (watched.buffers, target.count_nonzero()) == ([], 0)


def test_tied_weights_are_read_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    tree = saved({"model": model})
    watched = Watched(tree["model"].state["0.weight"].source)
    for tensor in tree["model"].state.values():
        object.__setattr__(tensor, "source", watched)
    restore({"model": model}, tree)
    assert [path for path, _ in watched.buffers] == [
        "model.0.weight",
        "model.0.bias",
        "model.1.bias",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_tensor_of_a_device_that_is_not_here_is_named():
    from dataclasses import replace

    from unbroken.capture import load_tensors

    tensor = replace(lazy(torch.rand(4))[0], device="cuda:1")
    with pytest.raises(StateMismatchError, match=r"x: .* expected cuda:1, found cpu"):
        load_tensors({"x": tensor})
