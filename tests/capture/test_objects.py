"""Every kind of object has its entry in the table; others are refused by name."""

from __future__ import annotations

import enum
from collections import namedtuple

import pytest
import torch
from torch import nn

from capture.round_trip import carry, loaded, saved, stored
from capture.tree_equality import account
from unbroken.capture import capture, check, restore, types_in
from unbroken.errors import CaptureError, StateMismatchError

Best = namedtuple("Best", "step loss")


class Phase(enum.Enum):
    WARM = 1
    COLD = 2


class Counter:
    """A user's own object; it keeps the very state that it is given."""

    def __init__(self, value=None):
        self.state = value

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Logger(Counter):
    pass


def test_any_object_with_a_state_dict_comes_back():
    state = {"best": (0.5, None), 3: {"seen"}, "ema": torch.rand(2)}
    target = Counter()
    carry({"counter": Counter(state)}, {"counter": target})
    assert account(target.state) == account(state)


def test_classes_in_the_live_state_are_allowed():
    source, target = (
        {"c": Counter([Best(1, 0.5), Phase.COLD])},
        {"c": Counter([Best(0, 9), Phase.WARM])},
    )
    tree = loaded(stored(capture(source)), types=types_in(capture(target)), lazy=True)
    restore(target, tree)
    assert target["c"].state == source["c"].state


def test_lists_and_dicts_of_objects_come_back():
    def objects(seed):
        torch.manual_seed(seed)
        return {"all": [Counter(seed), {"net": nn.Linear(2, 2)}, (torch.rand(2),)]}

    source, target = objects(1), objects(2)
    carry(source, target)
    assert target["all"][0].state == 1
    assert account(target["all"][1]["net"].weight) == account(source["all"][1]["net"].weight)
    assert account(target["all"][2]) == account(source["all"][2])


def test_a_tensor_is_filled_in_place():
    source, target = torch.rand(3), nn.Parameter(torch.zeros(3))
    with pytest.raises(StateMismatchError, match="expected Tensor, found Parameter"):
        carry({"t": source}, {"t": target})
    carry({"t": nn.Parameter(source)}, {"t": target})
    assert account(target.detach()) == account(source)


def test_state_restored_from_one_tree_is_shared_with_nothing():
    tree = saved({"c": Counter({"a": torch.zeros(2), "b": [1]})})
    one, two = Counter(), Counter()
    restore({"c": one}, tree)
    restore({"c": two}, tree)
    one.state["a"] += 1
    one.state["b"].append(2)
    assert account(two.state) == account({"a": torch.zeros(2), "b": [1]})


@pytest.mark.parametrize(
    "value", [3, object(), "text", len], ids=["int", "object", "str", "function"]
)
def test_an_object_without_state_is_refused_by_name(value):
    with pytest.raises(
        CaptureError, match=r"^callbacks\.1: .* no state to capture: found a builtins"
    ):
        capture({"callbacks": [Counter(), value]})


def test_a_value_that_cannot_be_stored_has_the_path_of_its_object():
    with pytest.raises(CaptureError, match=r"^callbacks\.0\.model_fn: "):
        stored(capture({"callbacks": [Counter({"model_fn": len})]}))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"a": Counter(), "b": Counter()}, "b: the checkpoint has no such object: found Counter"),
        ({}, "a: no such object is here: expected Counter"),
        ({"a": Logger()}, "a: is of another class: expected Counter, found Logger"),
        ({"a": [Counter()]}, "a: is another kind of object: expected Counter, found list"),
    ],
    ids=["added", "removed", "another class", "a list"],
)
def test_other_objects_are_named(target, message):
    with pytest.raises(StateMismatchError) as caught:
        check(target, saved({"a": Counter(1)}))
    assert str(caught.value) == message
