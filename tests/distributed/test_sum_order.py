"""Sums are added by rank, whoever comes first; and the store is kept clean."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
from torch.distributed import HashStore

from unbroken.distributed import Ranks

VALUES = [1e16, 1.0, -1e16, 1.0]  # (1e16 + 1.0) is 1e16: by rank, the sum is 1.0


def groups(store, world_size):
    return [Ranks(store, rank=rank, world_size=world_size) for rank in range(world_size)]


def sums_in_order(arrival):
    """Return the sums that four ranks get which come in this order, each after the one before."""
    store = HashStore()
    ranks = groups(store, len(VALUES))
    with ThreadPoolExecutor(len(VALUES)) as pool:
        asked = {}
        for rank in arrival:
            asked[rank] = pool.submit(ranks[rank].sum, [VALUES[rank]])
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
