"""Saves that go on while the host's Trainer trains; and those that somebody waits for."""

from __future__ import annotations

import signal

import pytest

BESIDE = {"beside": True}
HELD = {**BESIDE, "hold_commit_until": 8}


@pytest.mark.parametrize("save_mode", ["async", "overlap"])
def test_training_goes_on_while_a_checkpoint_is_written(save_mode, run, uninterrupted):
    done = run(save_mode=save_mode, **HELD)
    assert (done.status, done.bits) == (0, uninterrupted().bits), done.text
    assert (run.folder / "run/checkpoint-5/manifest.json").exists()


@pytest.mark.parametrize("waits", [{**HELD, "save_mode": "blocking"}, {**HELD, "beside": False}])
def test_training_waits_if_that_is_asked_for_or_a_callback_looks_at_saves(waits, run):
    failed = run(**waits)
    assert failed.status == 1
    assert "training stands still" in failed.text


@pytest.mark.parametrize("kill_at", [5, 6, 11, 36])
def test_a_kill_beside_a_save_loses_no_more_than_that_save(kill_at, run, uninterrupted):
    assert run(kill_at=kill_at, **BESIDE).status == -signal.SIGKILL
    resumed = run()
    saved = (kill_at - 1) // 5 * 5
    assert resumed.first_step in (saved + 1, max(0, saved - 5) + 1)
    assert resumed.bits == uninterrupted().bits


def test_the_last_save_is_there_when_the_run_ends(run):
    run(**BESIDE)
    assert (run.folder / "run/checkpoint-36/manifest.json").exists()


def test_a_stop_waits_for_its_save(run, uninterrupted):
    assert run(kill_at=8, signal=15, **BESIDE).status == 75
    resumed = run()
    assert (resumed.first_step, resumed.bits) == (9, uninterrupted().bits)
