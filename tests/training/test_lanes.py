"""Lanes in one process: when gradients are taken, and how many of them are held."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from torch import nn

from unbroken.distributed import RankSums, SingleProcess, Tree
from unbroken.errors import ConfigError
from unbroken.training.data_parallel import LaneReducer

NUMEL = 1013  # of no other tensor


def one_parameter() -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(NUMEL))
    return model


def lane_sum(model: nn.Module, lanes: int = 1) -> LaneReducer:
    lane_sum = LaneReducer(model, lanes, SingleProcess(), RankSums(SingleProcess()))
    lane_sum.begin_step()
    return lane_sum


def sets_of_gradients(model: nn.Module) -> int:
    """Return how many tensors of the parameter's size there are beside it."""
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() == NUMEL]
    return len({t.untyped_storage().data_ptr() for t in tensors} - {model.weight.data_ptr()})


@pytest.mark.parametrize(("lanes", "most"), [(1, 1), (2, 1), (4, 2), (16, 4)])
def test_of_all_lanes_log2_sums_are_held(lanes, most):
    gc.collect()
    model, held = one_parameter(), []
    sums = lane_sum(model, lanes)
    for lane in range(lanes):
        with sums.last_backward():
            model.weight.sum().mul(lane).backward()
        held.append(sets_of_gradients(model))
    assert max(held) == most


def test_a_model_is_free_when_its_run_is_over():
    model = one_parameter()
    watched = ref(model)
    lane_sum(model)
    del model
    gc.collect()
    assert watched() is None


def test_gradients_that_are_kept_are_counted():
    """The negative control of the count."""
    model, kept = one_parameter(), []
    sums = lane_sum(model, 4)
    for _ in range(4):
        with sums.last_backward():
            model.weight.sum().backward()
            kept.append(torch.ones(NUMEL))
    assert sets_of_gradients(model) >= 4


def two_buckets() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 1500), nn.Linear(1500, 1500), nn.Linear(1500, 1))


def gradient_of_the_last_layer_when_the_first_has_its_own(model, backward_pass):
    seen = []
    hook = model[0].weight.register_hook(lambda _: seen.append(model[1].weight.grad))
    with backward_pass:
        model(torch.ones(1, 1)).sum().backward()
    hook.remove()
    return seen[0]


def test_buckets_are_taken_while_the_backward_pass_runs():
    model = two_buckets()
    sums = lane_sum(model)
    assert (
        gradient_of_the_last_layer_when_the_first_has_its_own(model, sums.last_backward()) is None
    )


def test_gradients_are_left_to_gather_inside_a_lane():
    model = two_buckets()
    lane_sum(model)
    inside = gradient_of_the_last_layer_when_the_first_has_its_own(model, torch.enable_grad())
    assert inside is not None


def test_a_step_that_was_broken_off_leaves_nothing_to_the_next():
    model = one_parameter()
    sums = lane_sum(model)
    for _ in range(2):
        sums.begin_step()
        with sums.last_backward():
            model.weight.sum().backward()
    sums.add_loss(torch.tensor(0.5))
    assert sums.finish().item() == 0.5
    assert torch.equal(model.weight.grad, torch.ones(NUMEL))


def test_a_parameter_that_is_unfrozen_is_summed_from_the_next_step_on():
    model = one_parameter()
    model.late = nn.Parameter(torch.ones(1), requires_grad=False)
    sums = lane_sum(model, 2)
    model.late.requires_grad_(True)
    sums.begin_step()
    for _ in range(2):
        with sums.last_backward():
            (model.weight.sum() * model.late).sum().backward()
        sums.add_loss(torch.tensor(0.5))
    sums.finish()
    assert model.late.grad.item() == 2 * NUMEL


def test_a_gradient_that_comes_after_it_was_sent_is_refused_by_name():
    model = one_parameter()
    sums = lane_sum(model)
    with sums.last_backward():
        model.weight.sum().backward()
        with pytest.raises(ConfigError, match=r"model\.weight: had a second gradient"):
            model.weight.sum().backward()


def test_a_tree_adds_neighbours_first():
    a, b, c, d = (torch.tensor(value) for value in (1e8, 1.0, -1e8, 1.0))
    tree = Tree()
    for value in (a, b, c, d):
        tree.add(value.clone())
    assert tree.total().item() == ((a + b) + (c + d)).item() == 0.0
    assert (((a + b) + c) + d).item() == 1.0
