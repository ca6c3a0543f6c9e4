"""A rank killed at any phase of a save leaves the last checkpoint, an error, and the same run."""

from __future__ import annotations

import signal
import time
from itertools import product

import pytest

from distributed.ranks import run_ranks
from distributed.save_phases import (
    AT,
    BEFORE,
    PHASES,
    SECONDS,
    terminate,
    train_until_killed,
    train_without_room,
)
from distributed.training import STEPS, train
from scenarios import outcome
from unbroken.storage import LocalStorage
from unbroken.store import Catalog

FAILED, STOPPED = 3, 75
FEW_LINES = {"logging_steps": 8}
CASES = [
    (world_size, rank, phase, "blocking")
    for world_size in (2, 4)
    for rank, phase in product(range(world_size), PHASES)
]
BESIDE = [(2, rank, phase, "overlap") for rank, phase in product((0, 1), PHASES[1:])]


def finished(folder, world_size) -> dict:
    codes = run_ranks(train, str(folder / "run"), FEW_LINES, world_size=world_size)
    assert codes == [0] * world_size
    return outcome(folder / "run", STEPS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What runs of 2 and 4 ranks end with that nobody touched."""
    folder = tmp_path_factory.mktemp("whole")
    return {n: finished(folder / str(n), n) for n in (2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "rank", "phase", "save_mode"), CASES + BESIDE)
def test_a_rank_killed_in_a_save(world_size, rank, phase, save_mode, whole, tmp_path):
    began, case = time.monotonic(), (phase, rank, save_mode)
    codes = run_ranks(train_until_killed, str(tmp_path), *case, world_size=world_size)
    assert time.monotonic() - began < SECONDS
    assert codes == [-signal.SIGKILL if one == rank else FAILED for one in range(world_size)]
    for other in set(range(world_size)) - {rank}:
        text = (tmp_path / f"error-{other}").read_text()
        assert text.startswith(("RankTimeoutError: ", "RankError: "))
        assert f"rank {rank}" in text
    newest, rejected = Catalog(LocalStorage(tmp_path / "run")).newest_intact()
    if rank == 0:  # which commits
        assert newest.step == (AT if phase == "after commit" else BEFORE)
    assert (newest.step in (BEFORE, AT), rejected) == (True, ())
    assert finished(tmp_path, world_size) == whole[world_size]


def test_a_rank_killed_while_a_save_goes_on_beside_the_training(whole, tmp_path):
    test_a_rank_killed_in_a_save(2, 1, "written", "overlap", whole, tmp_path)


@pytest.mark.parametrize("save_mode", ["async", "overlap"])
def test_one_rank_asked_to_stop_meanwhile_ends_all_after_one_more_save(save_mode, whole, tmp_path):
    case = ("staged", 1, save_mode, terminate)
    codes = run_ranks(train_until_killed, str(tmp_path), *case)
    assert codes in ([STOPPED] * 2, [0] * 2)  # the last step may be over before it is asked
    newest, rejected = Catalog(LocalStorage(tmp_path / "run")).newest_intact()
    assert (newest.step >= AT, rejected) == (True, ())
    assert finished(tmp_path, 2) == whole[2]


@pytest.mark.parametrize(("rank", "save_mode"), [(0, "blocking"), (1, "blocking"), (1, "overlap")])
def test_the_full_disk_of_one_rank_ends_all_and_costs_nothing_saved(
    rank, save_mode, whole, tmp_path
):
    codes = run_ranks(train_without_room, str(tmp_path), rank, save_mode)
    assert codes == [FAILED] * 2
    own, other = ((tmp_path / f"error-{one}").read_text() for one in (rank, 1 - rank))
    assert own.startswith("SaveError: ")
    assert other.startswith(f"RankError: rank {rank}: ")
    assert "SaveError: " in other
    newest, rejected = Catalog(LocalStorage(tmp_path / "run")).newest_intact()
    assert (newest.step, rejected) == (BEFORE, ())
    assert finished(tmp_path, 2) == whole[2]
