"""What every group promises, as functions that all ranks of a fresh run call with their group."""

from __future__ import annotations

import math
import struct
import threading
import warnings

import pytest

from unbroken.distributed import join


def keep(claim) -> None:
    """Join, and hold the group to a claim; an error is this rank's exit code 1."""
    warnings.simplefilter("error")
    group = join(timeout=30.0)
    try:
        claim(group)
    finally:
        group.close()


def bits(values) -> list[str]:
    return [struct.pack(">d", value).hex() for value in values]


def each_rank_has_a_number(group):
    assert group.gather("rank", group.rank) == list(range(group.world_size))
    assert group.local_rank == group.rank


def gather_returns_the_value_of_each_rank_in_order(group):
    values = group.gather("loss", {"rank": group.rank, "loss": 0.1 * group.rank})
    assert values == [{"rank": rank, "loss": 0.1 * rank} for rank in range(group.world_size)]


def a_value_comes_back_as_json_keeps_it(group):
    own = group.gather("value", {"pair": (1, 2.5), 7: None, "text": "ä\n\0", "large": 2**70})
    assert own == [{"pair": [1, 2.5], "7": None, "text": "ä\n\0", "large": 2**70}] * len(own)


def values_that_are_no_numbers_come_back(group):
    values = group.gather("loss", [math.inf, -math.inf, math.nan, -0.0])[-1]
    assert values[:2] == [math.inf, -math.inf]
    assert math.isnan(values[2])
    assert bits(values[3:]) == bits([-0.0])


def share_returns_the_value_of_rank_0(group):
    assert group.broadcast("run", f"from rank {group.rank}") == "from rank 0"
    assert group.broadcast("run", "here" if group.rank == 0 else None) == "here"
    assert group.broadcast("nothing") is None


def a_value_may_be_larger_than_what_the_store_takes(group):
    text = group.broadcast("manifest", "0123456789" * 2_000_000 if group.rank == 0 else None)
    assert text == "0123456789" * 2_000_000


def agree_passes_where_all_have_the_same(group):
    group.agree("settings", {"seed": 1, "betas": (0.9, 0.95)})
    group.agree("settings", {"betas": [0.9, 0.95], "seed": 1})


def run_on_all_returns_the_own_result(group):
    assert group.run_on_all("double", lambda: 2 * group.rank) == 2 * group.rank


def run_on_all_may_hold_other_calls(group):
    values = group.run_on_all("outer", lambda: group.gather("inner", group.rank))
    assert values == list(range(group.world_size))


def an_error_on_every_rank_is_its_own(group):
    def fail():
        raise FileNotFoundError(f"rank {group.rank}")

    with pytest.raises(FileNotFoundError, match=f"^rank {group.rank}$"):
        group.run_on_all("open", fail)
    assert group.any(False) is False


def any_is_set_by_each_rank_alone(group):
    assert group.any(False) is False
    for rank in range(group.world_size):
        assert group.any(group.rank == rank) is True
    assert group.any(False) is False


def sum_adds_each_value_over_the_ranks(group):
    ranks = range(group.world_size)
    assert group.sum([group.rank, 0.5]) == [float(sum(ranks)), 0.5 * group.world_size]
    assert group.sum([]) == []


def sum_keeps_every_bit(group):
    extremes = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf]
    own = extremes if group.rank == group.world_size - 1 else [-0.0] * len(extremes)
    assert bits(group.sum(own)) == bits(extremes)


def another_thread_talks_apart(group):
    apart, found = group.new_subgroup(), []

    def talk() -> None:
        found.extend(apart.gather("apart", -number) for number in range(50))

    thread = threading.Thread(target=talk)
    thread.start()
    mine = [group.gather("here", number) for number in range(50)]
    thread.join()
    apart.close()
    assert mine == [[number] * group.world_size for number in range(50)]
    assert found == [[-number] * group.world_size for number in range(50)]
    assert group.any(False) is False


def closing_twice_is_allowed(group):
    group.close()
    group.close()


CLAIMS = [
    each_rank_has_a_number,
    gather_returns_the_value_of_each_rank_in_order,
    a_value_comes_back_as_json_keeps_it,
    values_that_are_no_numbers_come_back,
    share_returns_the_value_of_rank_0,
    a_value_may_be_larger_than_what_the_store_takes,
    agree_passes_where_all_have_the_same,
    run_on_all_returns_the_own_result,
    run_on_all_may_hold_other_calls,
    an_error_on_every_rank_is_its_own,
    any_is_set_by_each_rank_alone,
    sum_adds_each_value_over_the_ranks,
    sum_keeps_every_bit,
    another_thread_talks_apart,
    closing_twice_is_allowed,
]


def a_claim_that_is_false(group):
    assert group.gather("rank", group.rank) == []
