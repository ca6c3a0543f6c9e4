"""A cell that is run once more goes on in the same process, and takes over its own run."""

from __future__ import annotations

import gc

import pytest

from loops.scripts_of_loops import LeftError, Noisy, Run
from small_trainers import steps_in
from unbroken import Checkpointer, SavePolicy
from unbroken.errors import LockHeldError


def train(run, until, *, leave_at=None):
    for batch in run.run.steps(until, batch_size=4):
        run.train(batch)
        if run.run.step == leave_at:
            raise LeftError
    return run.bits


def whole(tmp_path):
    return train(Run(tmp_path / "whole", data=Noisy(), save_steps=2), 8)


def test_the_loop_alone_goes_on_where_it_was_left(tmp_path):
    run = Run(tmp_path / "cell", data=Noisy(), save_steps=2)
    with pytest.raises(LeftError):
        train(run, 8, leave_at=3)
    assert train(run, 8) == whole(tmp_path)
    assert steps_in(tmp_path / "cell") == [2, 4, 6, 8]


def test_with_another_end_it_goes_on_to_that(tmp_path):
    run = Run(tmp_path / "cell", data=Noisy(), save_steps=2)
    train(run, 3)
    assert train(run, 8) == whole(tmp_path)


@pytest.mark.parametrize("mode", ["blocking", "async"])
def test_the_whole_cell_takes_the_run_over_from_what_was_dropped(mode, tmp_path):
    policy = SavePolicy(steps=2, mode=mode)
    run = Run(tmp_path / "cell", data=Noisy(), save=policy)
    with pytest.raises(LeftError):
        train(run, 8, leave_at=5)
    del run
    again = Run(tmp_path / "cell", data=Noisy(), save=policy)
    assert train(again, 8) == whole(tmp_path)
    assert "resuming from" in again.told[0]
    assert "(step 4)" in again.told[0]


def test_it_takes_it_over_from_an_idle_one_that_a_traceback_holds(tmp_path):
    run = Run(tmp_path / "cell", data=Noisy(), save_steps=2)
    with pytest.raises(LeftError):
        train(run, 8, leave_at=5)
    assert train(Run(tmp_path / "cell", data=Noisy(), save_steps=2), 8) == whole(tmp_path)
    assert run.run.step == 5


def test_it_does_not_from_one_whose_loop_is_under_way(tmp_path):
    run = Run(tmp_path / "cell", data=Noisy(), save_steps=2)
    second = Run(tmp_path / "cell", data=Noisy(), save_steps=2)
    for batch in run.run.steps(2, batch_size=4):
        with pytest.raises(LockHeldError):
            second.run.steps(2, batch_size=4)
        run.train(batch)


def test_nor_from_one_whose_loop_is_written_by_hand(tmp_path):
    first = Checkpointer(tmp_path, model=Run(tmp_path).model, tell=None)
    first.resume()
    with pytest.raises(LockHeldError):
        Checkpointer(tmp_path, model=Run(tmp_path).model, tell=None).resume()
    del first
    gc.collect()
    Checkpointer(tmp_path, model=Run(tmp_path).model, tell=None).resume()
