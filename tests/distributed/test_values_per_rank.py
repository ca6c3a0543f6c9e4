"""A value may differ by rank: each is compared with what it was. What is trained may not."""

from __future__ import annotations

import json
import signal

import pytest

from distributed.ranks import run_ranks
from distributed.values_per_rank import (
    OTHERS,
    STEPS,
    begin_all,
    train_with_followers,
    train_with_values,
)


def read(folder, world_size: int) -> list[dict]:
    return [json.loads((folder / f"told-{rank}").read_text()) for rank in range(world_size)]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """What each rank is told in a second start, and rank 0 in a third, on more ranks."""
    folder = tmp_path_factory.mktemp("values")
    for last, world_size in ((STEPS - 2, 2), (STEPS - 1, 2), (STEPS, 4)):
        codes = run_ranks(train_with_values, str(folder), last, world_size=world_size)
        assert codes == [-signal.SIGKILL] * world_size
        if world_size == 2:
            again = read(folder, 2)
    return again, read(folder, 4)


@pytest.mark.parametrize("kind", ["loop", "trainer"])
def test_a_value_that_differs_by_rank_is_compared_with_what_that_rank_had(kind, resumed):
    again, _ = resumed
    for rank in again:
        assert ": exact" in rank[kind][0], rank[kind]


def test_on_other_ranks_such_a_value_is_no_difference(resumed):
    _, elsewhere = resumed
    for rank in elsewhere:
        assert ": equivalent" in rank["loop"][0], rank["loop"]
        assert not [line for line in rank["loop"] if "RANK" in line or "seed" in line]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """What each rank ended with in one piece, in two, and, on more ranks, in a third."""
    found = {}
    for name, parts in {"whole": [(4, 2)], "cut": [(2, 2), (4, 2), (5, 4)]}.items():
        folder = tmp_path_factory.mktemp(name)
        for last, world_size in parts:
            arguments = (train_with_followers, str(folder), last, 4)
            assert run_ranks(*arguments, world_size=world_size) == [-signal.SIGKILL] * world_size
            found[name, last] = read(folder, world_size)
    return found


@pytest.mark.parametrize("kind", ["callback", "state"])
def test_what_each_rank_keeps_of_its_own_in_a_trainer_comes_back(kind, followed):
    whole, cut = ([rank[kind] for rank in followed[name, 4]] for name in ("whole", "cut"))
    assert [one[:2] for one in cut] == [one[:2] for one in whole]
    assert whole[0][0] != whole[1][0]  # rank 0's for all would end elsewhere
    assert all(": exact" in lines[0] for *_, lines in cut)


@pytest.mark.parametrize("kind", ["callback", "state"])
def test_on_other_ranks_what_each_kept_of_its_own_is_not_covered(kind, followed):
    name = {"callback": "callbacks", "state": "own"}[kind]
    *_, lines = followed["cut", 5][0][kind]
    assert "not known to be exact" in lines[0]
    assert any(f"{name}: stored one of each of 2 ranks, now 4 ranks" in line for line in lines)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    assert run_ranks(begin_all, str(folder), world_size=2) == [0, 0]
    return read(folder, 2)


@pytest.mark.parametrize("name", OTHERS)
def test_ranks_that_do_not_train_alike_are_named_before_the_first_step(name, begun):
    for rank in begun:
        assert OTHERS[name][1] in rank[name]
        assert rank[name].startswith("RankError")
