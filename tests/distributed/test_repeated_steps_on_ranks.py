"""Each rank compares the steps that it repeats; what one finds, all ranks act on."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from distributed.ranks import run_ranks
from repeated_loops import LoopOnRanks, TrainerOnRanks, train_on_a_rank
from small_trainers import steps_in

KILLED = [-signal.SIGKILL] * 2


@pytest.fixture
def start(tmp_path):
    """Start the loop on two ranks; the second one divides its loss by another number."""

    def start(kill_after, *, exact="prefer", of_second=1.0, world_size=2):
        more = (str(tmp_path / "run"), kill_after, exact)
        temperatures = [1.0, of_second][:world_size]
        return run_ranks(train_on_a_rank, *more, of_rank=temperatures, world_size=world_size)

    return start


def told(tmp_path, rank=0):
    return (tmp_path / f"run.out{rank}").read_text()


def test_repeated_steps_of_all_ranks_are_confirmed(start, tmp_path):
    assert start(10) == KILLED
    assert start(None) == [0, 0]
    assert "steps 9 to 10 repeated with the same bits" in told(tmp_path)


def test_what_another_rank_does_not_repeat_is_told_at_the_next_save(start, tmp_path):
    assert start(10) == KILLED
    assert start(None, of_second=2.0) == [0, 0]
    assert "rank 1: step 9 was not repeated with the same bits" in told(tmp_path)


def test_under_require_all_ranks_end_together_before_the_next_commit(start, tmp_path):
    assert start(10, exact="require") == KILLED
    assert start(None, exact="require", of_second=2.0) == [1, 1]
    assert steps_in(tmp_path / "run") == [4, 8]


ON_OTHERS = "(equivalent, not exact; another number of ranks)"


def test_on_another_number_of_ranks_the_learning_rate_is_compared(start, tmp_path):
    assert start(10) == KILLED
    assert start(None, world_size=1) == [0]
    assert f"repeated with the same learning rate {ON_OTHERS}" in told(tmp_path)


def on_ranks(tmp_path, killed, resumed, world_sizes):
    """Kill a run on some ranks, resume it on others; return what was told and found."""
    folder = tmp_path / "run"
    for case, size in zip((killed, resumed), world_sizes, strict=True):
        assert run_ranks(case.run, str(folder), world_size=size) in ([0] * size, [-9] * size)
    lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return Path(f"{folder}.out"), [one for one in lines if one["event"] == "repeated"]


@pytest.mark.parametrize("world_sizes", [(2, 1), (1, 2)])
def test_on_another_number_of_ranks_the_samples_of_all_are_compared(tmp_path, world_sizes):
    out, _ = on_ranks(tmp_path, LoopOnRanks(kill_after=7), LoopOnRanks(), world_sizes)
    line = f"steps 5 to 7 repeated with the same learning rate and samples {ON_OTHERS}"
    assert line in out.read_text()


def test_only_what_was_compared_is_called_the_same(tmp_path):
    case = LoopOnRanks(kill_after=19, save_steps=10)  # later steps have no samples in their records
    out, _ = on_ranks(tmp_path, case, replace(case, kill_after=None), (2, 1))
    line = "steps 11 to 19 repeated with the same learning rate and samples (in 8 of them)"
    assert f"{line} {ON_OTHERS}" in out.read_text()


@pytest.mark.parametrize("world_sizes", [(2, 1), (1, 2)])
def test_a_position_that_is_lost_shows_on_another_number_of_ranks(tmp_path, world_sizes):
    lost = LoopOnRanks(lost=4, kill_after=8)
    _, found = on_ranks(tmp_path, LoopOnRanks(kill_after=7), lost, world_sizes)
    (found,) = [one for one in found if not one["same"]]
    assert (found["step"], found["same"]) == (5, False)
    assert "the batch is the one of 1 step later" in found["words"]


def test_what_a_collator_draws_on_another_number_of_ranks_is_not_condemned(tmp_path):
    noisy = LoopOnRanks(noisy=True, kill_after=7)
    _, found = on_ranks(tmp_path, noisy, replace(noisy, micro=4, kill_after=9), (2, 1))
    assert [one["same"] for one in found if "words" in one] == [None]


def test_an_accepted_change_is_not_condemned_on_another_number_of_ranks(tmp_path):
    killed = TrainerOnRanks(kill_after=7)
    _, (found,) = on_ranks(tmp_path, killed, TrainerOnRanks(learning_rate=0.02), (2, 1))
    assert (found["from"], found["to"], found["same"]) == (5, 7, True)


def test_records_of_ranks_that_are_no_more_go_with_their_checkpoints(tmp_path):
    folder = tmp_path / "run"
    on_ranks(tmp_path, LoopOnRanks(kill_after=7), LoopOnRanks(kill_after=9), (2, 1))
    assert [*(folder / "step-records").glob("*-rank1-*")]
    for step in (4, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run_ranks(LoopOnRanks(kill_after=1).run, str(folder), world_size=1)
    assert not [*(folder / "step-records").glob("*-rank1-*")]
