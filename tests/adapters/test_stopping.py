"""Asked to stop, ours saves at the edge of the step and says so by its exit status."""

from __future__ import annotations

import signal

import pytest

from adapters.kill_cases import CASES
from unbroken.checkpoint import EXIT_STOPPED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_ends_with_status_75(number, run, uninterrupted):
    stopped = run(kill_at=8, signal=int(number))
    assert stopped.status == EXIT_STOPPED
    assert f"stopped by {number.name} after step 8" in stopped.text
    resumed = run()
    assert (resumed.first_step, resumed.bits) == (9, uninterrupted().bits)


@pytest.mark.parametrize("name", ["accumulation with a remainder", "random masks, two workers"])
def test_a_stop_is_exact_in(name, run, uninterrupted):
    assert run(kill_at=4, signal=15, **CASES[name]).status == EXIT_STOPPED
    assert run(**CASES[name]).bits == uninterrupted(**CASES[name]).bits


def test_a_stop_in_the_last_step_lets_the_run_end(run, uninterrupted):
    stopped = run(kill_at=36, signal=15)
    assert (stopped.status, stopped.bits) == (0, uninterrupted().bits)


def test_a_signal_before_the_first_step_ends_the_start_and_changes_nothing(run, uninterrupted):
    run(kill_at=8)
    before = sorted((run.folder / "run").glob("checkpoint-*"))
    stopped = run(kill_at="no step", signal=15)
    assert stopped.status == EXIT_STOPPED
    assert "stopped by SIGTERM before the first step: run the same command again" in stopped.text
    assert sorted((run.folder / "run").glob("checkpoint-*")) == before
    assert run().bits == uninterrupted().bits


def test_the_hosts_own_way_of_stopping_is_not_used_beside_ours(run):
    assert run(kill_at=8, signal=15, args={"enable_jit_checkpoint": True}).status == EXIT_STOPPED
    assert (run.folder / "run/checkpoint-8/manifest.json").exists()
