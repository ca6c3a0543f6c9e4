"""Sums are added in one order for all versions, whoever comes first; and the store is kept clean.

What a run computed with one version it must compute with the next: the orders stand here.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch
from torch.distributed import HashStore

from distributed.ranks import run_ranks
from distributed.sample_order import sum_over_ranks
from unbroken.distributed import StoreGroup, Tree

VALUES = [1e16, 1.0, -1e16, 1.0]  # (1e16 + 1.0) is 1e16: by rank, the sum is 1.0


def groups(store, world_size):
    return [StoreGroup(store, rank=rank, world_size=world_size) for rank in range(world_size)]


def sums_in_order(arrival):
    """Return the sums that four ranks get which come in this order, each after the one before."""
    store = HashStore()
    ranks = groups(store, len(VALUES))
    with ThreadPoolExecutor(len(VALUES)) as pool:
        asked = {}
        for rank in arrival:
            asked[rank] = pool.submit(ranks[rank].sum, [VALUES[rank]])
            if rank != arrival[-1]:  # what the last one tells may be read by all, and gone, at once
                store.wait([f"1/{rank}"])
        sums = [asked[rank].result() for rank in range(len(VALUES))]
    for group in ranks:
        group.close()
    return sums


@pytest.mark.parametrize("arrival", list(permutations(range(4))), ids=str)
def test_a_sum_does_not_depend_on_who_comes_first(arrival):
    assert sums_in_order(arrival) == [[1.0]] * 4


def test_these_values_sum_to_something_else_in_another_order():
    assert {sum(values) for values in permutations(VALUES)} == {0.0, 1.0, 2.0}


def test_the_store_does_not_grow_with_the_calls():
    store = HashStore()
    first, second = groups(store, 2)
    with ThreadPoolExecutor(1) as pool:
        for step in range(100):
            answer = pool.submit(second.gather, "step", step)
            assert first.gather("step", step) == [step, step] == answer.result()
    for group in (first, second):
        group.close()
    assert store.num_keys() <= 8


class Spelled:
    """Stands for a tensor, and spells out how it was added."""

    def __init__(self, text: str) -> None:
        self.text = text

    def add_(self, other: Spelled) -> Spelled:
        self.text = f"({self.text}+{other.text})"
        return self


ORDERS = [
    "0",
    "(0+1)",
    "((0+1)+2)",
    "((0+1)+(2+3))",
    "(((0+1)+(2+3))+4)",
    "(((0+1)+(2+3))+(4+5))",
    "(((0+1)+(2+3))+((4+5)+6))",
    "(((0+1)+(2+3))+((4+5)+(6+7)))",
    "((((0+1)+(2+3))+((4+5)+(6+7)))+8)",
]


@pytest.mark.parametrize("order", ORDERS)
def test_a_tree_adds_neighbours_and_then_what_is_left_over_from_the_right(order):
    tree = Tree()
    for _ in range(2):  # it begins anew
        for number in range(ORDERS.index(order) + 1):
            tree.add(Spelled(str(number)))
        assert tree.total().text == order


WORLDS = {3: ([1e8, -1e8, 3.0], 3.0), 4: ([1e8, 3.0, -1e8, 5.0], 8.0)}


@pytest.mark.parametrize("world_size", WORLDS)
def test_parts_of_ranks_are_added_in_the_order_of_the_tree(world_size, tmp_path):
    parts, total = WORLDS[world_size]
    codes = run_ranks(sum_over_ranks, str(tmp_path), parts, world_size=world_size)
    assert codes == [0] * world_size
    for rank in range(world_size):
        assert (tmp_path / str(rank)).read_text() == total.hex(), "at each place of a tensor"


@pytest.mark.parametrize("world_size", WORLDS)
def test_these_parts_sum_to_something_else_in_another_order(world_size):
    parts, total = WORLDS[world_size]
    other = parts[::-1] if world_size == 3 else parts  # from the other end; without a tree
    assert one_after_the_other(other) != total


def one_after_the_other(parts: list[float]) -> float:
    total = torch.zeros(())
    for part in parts:
        total += part
    return float(total)
