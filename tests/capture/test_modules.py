"""A module comes back whole: names, ties, modes, buffers, extra state; or it says what differs."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from capture.round_trip import carry, saved, stored
from capture.tree_equality import account
from unbroken.capture import capture, check, files_for, named_parameters, restore
from unbroken.errors import CaptureError, StateMismatchError


class Net(nn.Module):
    """Everything that a state_dict loses: a tie, modes, a buffer that is not persistent."""

    def __init__(self, width=4):
        super().__init__()
        self.wte = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout()
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.rand(3), persistent=False)


class WithExtra(nn.Linear):
    """Has state outside of its tensors."""

    def __init__(self):
        super().__init__(2, 2)
        self.amax = {("in", 0): torch.rand(3), "steps": 1}

    def get_extra_state(self):
        return self.amax

    def set_extra_state(self, state):
        self.amax = state


def net(seed, width=4):
    torch.manual_seed(seed)
    return Net(width)


def whole(module):
    """Return everything about a module that a run depends on."""
    tensors = [*module.parameters(), *module.buffers()]
    return account(tensors), [part.training for part in module.modules()]


def test_all_tensors_come_back():
    source, target = net(0), net(1)
    assert whole(target) != whole(source)
    carry({"model": source}, {"model": target})
    assert whole(target) == whole(source)


def test_modes_and_requires_grad_come_back():
    source, target = net(0), net(1)
    source.drop.eval()
    source.norm.weight.requires_grad_(requires_grad=False)
    carry({"model": source}, {"model": target})
    assert whole(target) == whole(source)
    assert not target.drop.training
    assert not target.norm.weight.requires_grad


def test_parameters_are_filled_in_place_and_stay_tied():
    target = net(1)
    before = [(parameter, parameter.data_ptr()) for parameter in target.parameters()]
    carry({"model": net(0)}, {"model": target})
    assert all(
        p is q and p.data_ptr() == at
        for p, (q, at) in zip(target.parameters(), before, strict=True)
    )
    assert target.head.weight is target.wte.weight


def test_filling_in_place_is_seen_by_autograd():
    target = net(1)
    version = target.wte.weight._version
    carry({"model": net(0)}, {"model": target})
    assert target.wte.weight._version > version


def test_a_model_has_its_own_file_with_bare_names():
    objects = {"model": net(0), "ema": AveragedModel(net(0))}
    reader = stored(capture(objects), files_for(objects))
    files = {entry.name: entry for entry in reader.manifest.files}
    assert set(files) == {
        *("model.safetensors", "ema.safetensors", "buffers.safetensors", "state.json")
    }
    assert "model.wte.weight" in reader.manifest.tensors
    assert "model.head.weight" not in reader.manifest.tensors
    assert reader.manifest.tensors["ema.n_averaged"].shards[0].file == "ema.safetensors"


compiles = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")


@compiles
def test_names_are_those_of_the_bare_model():
    bare = net(0)
    bare.norm = torch.compile(bare.norm)
    wrapped = torch.compile(DataParallel(bare))
    names = [name for name, _ in named_parameters(wrapped)]
    assert names == ["wte.weight", "norm.weight", "norm.bias", "head.weight"]


@pytest.fixture
def one_rank():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_ddp_takes_the_state_of_a_bare_model():
    source, target = net(0), net(1)
    wrapped = DistributedDataParallel(target)
    carry({"model": source}, {"model": wrapped})
    assert whole(target) == whole(source)
    assert next(name for name, _ in named_parameters(wrapped)) == "wte.weight"


@compiles
def test_a_compiled_model_takes_the_state_of_a_bare_one_and_its_mode():
    source, target = net(0).eval(), net(1)
    carry({"model": source}, {"model": torch.compile(target)})
    assert whole(target) == whole(source)


def test_an_averaged_model_comes_back_with_its_count():
    source, target = (AveragedModel(net(n), multi_avg_fn=get_ema_multi_avg_fn()) for n in (0, 1))
    source.update_parameters(net(2))
    source.update_parameters(net(3))
    carry({"ema": source}, {"ema": target})
    assert whole(target) == whole(source)
    assert target.n_averaged == 2


def test_extra_state_goes_through_the_codec():
    source, target = WithExtra(), WithExtra()
    carry({"model": source}, {"model": target})
    assert account(target.amax) == account(source.amax)


class Scaled(nn.Linear):
    """Derives a number from its weights when its extra state comes back."""

    def __init__(self):
        super().__init__(2, 2)
        self.scale = None

    def get_extra_state(self):
        return "scaled"

    def set_extra_state(self, state):
        self.scale = self.weight.abs().max().item()


def test_extra_state_comes_back_after_the_tensors():
    source, target = Scaled(), Scaled()
    carry({"model": source}, {"model": target})
    assert target.scale == source.weight.abs().max().item()


def test_a_module_that_saves_in_its_own_way_is_refused():
    class Packed(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[prefix + "packed"] = b"secret"

    with pytest.raises(CaptureError, match=r"model\.0: Packed saves more .* found packed"):
        capture({"model": nn.Sequential(Packed(1, 1))})


def test_memory_formats_of_convolutions_are_kept():
    source = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    target = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    carry({"model": source}, {"model": target})
    assert account(list(target.parameters())) == account(list(source.parameters()))


def test_another_memory_format_is_a_mismatch():
    source = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with pytest.raises(StateMismatchError, match=r"model\.weight: has other strides"):
        carry({"model": source}, {"model": nn.Conv2d(3, 4, 3)})


def test_a_parameter_that_is_a_view_with_holes_is_filled():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    target.weight = nn.Parameter(torch.zeros(2, 6)[:, ::2])
    carry({"model": source}, {"model": target})
    assert torch.equal(target.weight.view(torch.int32), source.weight.view(torch.int32))


MISFITS = {
    "wider": (lambda: net(1, width=8), "expected float32[5, 4], found float32[5, 8]"),
    "half": (lambda: net(1).half(), "expected float32[5, 4], found float16[5, 4]"),
    "on meta": (lambda: net(1).to("meta"), "on the meta device"),
    "another class": (lambda: nn.Linear(1, 1), "expected Net, found Linear"),
}


@pytest.mark.parametrize(("build", "message"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_is_named_with_both_sides(build, message):
    with pytest.raises(StateMismatchError) as caught:
        carry({"model": net(0)}, {"model": build()})
    assert message in str(caught.value)


def test_a_missing_tie_is_named():
    target = net(1)
    target.head.weight = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(StateMismatchError, match=r"head\.weight, wte\.weight: are tied in the"):
        carry({"model": net(0)}, {"model": target})


def test_an_added_tie_is_named():
    source = net(0)
    source.head.weight = nn.Parameter(torch.zeros(5, 4))
    with pytest.raises(StateMismatchError, match="are tied here, but not in the checkpoint"):
        carry({"model": source}, {"model": net(1)})


def test_missing_and_unexpected_tensors_are_listed_and_counted():
    source, target = net(0), net(1)
    source.extra, target.other = nn.Linear(1, 1), nn.Linear(2, 2)
    with pytest.raises(StateMismatchError) as caught:
        carry({"model": source}, {"model": target})
    text = str(caught.value)
    assert "in 4 places" in text
    assert "model.other.weight: the checkpoint has no such tensor" in text
    assert "model.extra.weight: no such tensor is here: expected float32[1, 1]" in text


def test_a_hundred_mismatches_are_not_all_shown():
    layers = [nn.Sequential(*(nn.Linear(1, n) for _ in range(50))) for n in (1, 2)]
    with pytest.raises(StateMismatchError, match="in 100 places") as caught:
        carry({"model": layers[0]}, {"model": layers[1]})
    assert "and 95 more" in str(caught.value)


def test_nothing_is_changed_when_anything_does_not_fit():
    target = {"model": net(1), "critic": nn.Linear(2, 2)}
    before = whole(target["model"]), whole(target["critic"])
    with pytest.raises(StateMismatchError):
        carry({"model": net(0), "critic": nn.Linear(3, 3)}, target)
    assert (whole(target["model"]), whole(target["critic"])) == before


def test_check_changes_nothing():
    target = net(1)
    before = whole(target)
    check({"model": target}, saved({"model": net(0)}))
    assert whole(target) == before


def test_one_tree_restores_two_models_that_share_nothing():
    tree, one, two = saved({"model": net(0)}), net(1), net(2)
    restore({"model": one}, tree)
    restore({"model": two}, tree)
    assert whole(one) == whole(two) == whole(net(0))
    assert one.wte.weight.data_ptr() != two.wte.weight.data_ptr()
