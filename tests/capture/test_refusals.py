"""What cannot be stored is refused with its path and its type, never dropped or flattened."""

from __future__ import annotations

import enum
import random
from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from capture.round_trip import there_and_back
from capture.trees import Color, Point
from unbroken.capture import encode
from unbroken.errors import CaptureError, StateMismatchError


class MyDict(dict):
    pass


class MyPoint(Point):
    pass


class MyFloat(float):
    pass


class MyTensor(torch.Tensor):
    pass


class Named:
    def state_dict(self):
        return {}


REFUSED = {
    "a function": lambda: 0,
    "an object": object(),
    "a module": nn.Linear(1, 1),
    "a stateful object": Named(),
    "a class": Named,
    "a dict subclass": MyDict(a=1),
    "a namedtuple subclass": MyPoint(1, 2),
    "a float subclass": MyFloat(1),
    "a defaultdict of code": defaultdict(lambda: 0),
    "a masked array": np.ma.masked_array([1, 2]),
    "an object array": np.array([object()]),
    "an array with a field of objects": np.zeros(1, [("a", "O")]),
    "a record": np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")])[0],
    "a string array with missing values": np.array(["a"], np.dtypes.StringDType()),
    "a tensor subclass": torch.zeros(2).as_subclass(MyTensor),
    "a lazy parameter": nn.LazyLinear(2).weight,
    "a sparse tensor": torch.eye(2).to_sparse(),
    "a meta tensor": torch.zeros(2, device="meta"),
    "a tensor with a graph": torch.zeros(2, requires_grad=True) * 2,
    "a tensor as a key": {torch.zeros(2): 1},
    "a set of tensors": {torch.zeros(2)},
    "a generator": random.Random(1),
    "a slice": slice(1, 2),
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_it_is_refused_by_its_path(value):
    with pytest.raises(CaptureError) as caught:
        encode({"callbacks": [{"model_fn": value}]})
    assert caught.value.where == "callbacks.0.model_fn"
    assert caught.value.found is not None or "tensor" in caught.value.what


WEIGHT = nn.Parameter(torch.zeros(2))
PAIR = (WEIGHT, 1)


@pytest.mark.parametrize(
    "value",
    [
        {WEIGHT: 1},
        defaultdict(int, {WEIGHT: 1}),
        {(0, (WEIGHT,)): 1},
        {PAIR: 1},
        {WEIGHT},
        {frozenset({WEIGHT})},
    ],
    ids=str,
)
def test_a_tensor_that_was_seen_before_is_no_key_either(value):
    """It was saved, and no checkpoint of such a run could ever be read."""
    with pytest.raises(CaptureError, match="a tensor cannot be a key"):
        encode({"model": {"weight": WEIGHT, "pair": PAIR}, "slow": value})


def test_a_pair_that_stands_elsewhere_too_may_be_a_key():
    pair = (1, "a")
    tree = {"pair": pair, "by pair": {pair: 2}}
    assert there_and_back(tree) == tree


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused():
    with pytest.raises(CaptureError, match="a nested tensor"):
        encode(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]))


def test_the_message_says_where_what_and_what_to_do():
    with pytest.raises(CaptureError) as caught:
        encode({"callbacks": [{"model_fn": len}]})
    found = "found a builtins.builtin_function_or_method"
    assert str(caught.value) == f"callbacks.0.model_fn: cannot be stored: {found}"
    assert "keep a name" in caught.value.hint


@pytest.mark.parametrize("container", [list, dict, OrderedDict])
def test_a_cycle_is_refused(container):
    tree = container()
    inside = (tree,)
    tree.append(inside) if container is list else tree.update(again=inside)
    with pytest.raises(CaptureError, match="contains itself"):
        encode({"a": tree})


def test_a_tree_nested_without_end_is_refused():
    tree = []
    for _ in range(5000):
        tree = [tree]
    with pytest.raises(CaptureError, match="nested deeper than 64"):
        encode(tree)


def test_the_deepest_tree_allowed_comes_back():
    tree = {"x": 1}
    for _ in range(63):
        tree = {(1, 2): tree}
    assert there_and_back(tree) == tree


def test_tensors_that_overlap_in_memory_of_different_owners_are_refused():
    array = np.arange(6.0)
    tensors = [torch.from_numpy(array[:4]), torch.from_numpy(array[2:])]
    with pytest.raises(CaptureError, match="overlaps the memory of 0"):
        encode(tensors)


def test_a_rule_that_gives_two_leaves_one_place_is_refused():
    with pytest.raises(CaptureError, match="has the place of a"):
        encode({"a": torch.zeros(1), "b": torch.ones(1)}, file_of=lambda path: ("f", "x"))


@pytest.mark.parametrize("value", [Color.RED, Point(1, 2)], ids=repr)
def test_a_class_that_was_not_given_is_named(value):
    with pytest.raises(StateMismatchError) as caught:
        there_and_back({"best": value})
    assert caught.value.where == "best"
    assert type(value).__name__ in caught.value.hint


def test_a_namedtuple_with_other_fields_is_not_filled():
    other = namedtuple("Point", "x z")
    with pytest.raises(StateMismatchError, match="has other fields"):
        there_and_back(Point(1, 2), types=[other])


def test_an_enum_that_lost_a_member_is_named():
    other = enum.Enum("Color", {"GREEN": 3, "LIKE_RED": "RED"})
    with pytest.raises(StateMismatchError, match="has no such member: expected RED"):
        there_and_back(Color.RED, types=[other])


def test_two_classes_of_one_name_are_told_apart_by_module():
    other = namedtuple("Point", "x y", module="elsewhere")
    assert type(there_and_back(Point(1, 2), types=[other, Point])) is Point
