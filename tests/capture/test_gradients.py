"""Gradients that wait for an optimizer step come back; where there was none, there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from capture.round_trip import loaded, stored
from capture.tree_equality import account
from unbroken.capture import capture_gradients, restore_gradients
from unbroken.errors import StateMismatchError


def half_trained(seed):
    """Return a model that accumulated a gradient in its first layer alone."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0](torch.randn(3, 2)).square().sum().backward()
    return model


def gradients(model):
    return [None if p.grad is None else account(p.grad) for p in model.parameters()]


@pytest.mark.parametrize("lazy", [True, False])
def test_gradients_come_back_and_none_stays_none(lazy):
    source, target = half_trained(0), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    target[1].weight.grad = torch.ones(2, 2)
    restore_gradients(target, loaded(stored(capture_gradients(source)), lazy=lazy))
    assert gradients(target) == gradients(source)
    assert gradients(source)[2:] == [None, None]


@pytest.mark.parametrize("lazy", [True, False])
def test_a_gradient_that_is_there_is_filled_in_place(lazy):
    source, target = half_trained(0), half_trained(1)
    before = target[0].weight.grad
    restore_gradients(target, loaded(stored(capture_gradients(source)), lazy=lazy))
    assert target[0].weight.grad is before
    assert gradients(target) == gradients(source)


def test_a_restored_gradient_is_no_alias_of_the_tree():
    tree = capture_gradients(half_trained(0))
    target = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    restore_gradients(target, tree)
    target[0].weight.grad.zero_()
    assert tree["0.weight"].count_nonzero() > 0


def test_accumulation_goes_on_to_the_same_sum():
    source, target = half_trained(0), half_trained(0)
    target.zero_grad()
    restore_gradients(target, loaded(stored(capture_gradients(source)), lazy=True))
    for model in (source, target):
        model(torch.ones(1, 2)).sum().backward()
    assert gradients(target) == gradients(source)


def test_parameters_can_be_given_by_name():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    assert list(capture_gradients({"a": parameter, "b": nn.Parameter(torch.zeros(1))})) == ["a"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear(2, 2), r"gradients\.0\.weight: no such parameter is here"),
        (nn.Sequential(nn.Linear(3, 2)), r"expected float32\[2, 2\], found float32\[2, 3\]"),
    ],
    ids=["missing", "wider"],
)
def test_a_gradient_that_fits_nowhere_is_named(target, message):
    tree = loaded(stored(capture_gradients(half_trained(0))), lazy=True)
    with pytest.raises(StateMismatchError, match=message):
        restore_gradients(target, tree)
    assert all(parameter.grad is None for parameter in target.parameters())
