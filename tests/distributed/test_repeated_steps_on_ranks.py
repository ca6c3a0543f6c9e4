"""Each rank compares the steps that it repeats; what one finds, all ranks act on."""

from __future__ import annotations

import signal

import pytest

from distributed.ranks import run_ranks
from repeated_loops import train_on_a_rank
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


def test_on_another_number_of_ranks_the_learning_rate_is_compared(start, tmp_path):
    assert start(10) == KILLED
    assert start(None, world_size=1) == [0]
    line = "repeated with the same learning rate (another number of ranks)"
    assert line in told(tmp_path)
