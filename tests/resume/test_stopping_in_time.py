"""Signals and deadlines: saved at the step edge, a status that says "start me again"."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from scenarios import metrics
from small_trainers import PAIRS, bits, small_trainer, steps_in
from unbroken.checkpoint import EXIT_STOPPED, Preemption, TrainingStopped
from unbroken.errors import ConfigError
from unbroken.storage import LocalStorage
from unbroken.training import Callback

SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from small_trainers import small_trainer
from unbroken.training import Callback

class Signals(Callback):
    def on_micro_batch_end(self, trainer):
        if trainer.progress.step == 2:
            for name in sys.argv[3:]:
                os.kill(os.getpid(), getattr(signal, name))

small_trainer(sys.argv[2], save_steps=100, trainer={"callbacks": [Signals()]}).train()
"""


def run_script(tmp_path, *signals):
    here = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-c", SCRIPT, here, str(tmp_path), *signals]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_at_the_step_edge_and_ends_with_status_75(name, tmp_path):
    done = run_script(tmp_path, name)
    assert (done.returncode, done.stderr) == (EXIT_STOPPED, "")
    assert steps_in(tmp_path) == [0, 3]


def test_a_second_ctrl_c_stops_at_once_and_loses_nothing_saved(tmp_path):
    done = run_script(tmp_path, "SIGINT", "SIGINT")
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr
    assert steps_in(tmp_path) == [0]


def test_a_run_stopped_by_a_signal_goes_on_with_the_same_bits(tmp_path):
    run_script(tmp_path / "stopped", "SIGTERM")
    whole, stopped = small_trainer(tmp_path / "whole"), small_trainer(tmp_path / "stopped")
    whole.train()
    assert stopped.train().resume_report.step == 3
    assert bits(stopped.model) == bits(whole.model)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


class SignalledWhenRead(LocalStorage):
    """The signal comes while a checkpoint is verified."""

    def open(self, path):
        if path.startswith("checkpoint-2/model"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().open(path)


class SignalledWhenReadAgain:
    """Batches; the signal comes while those before the checkpoint are read again."""

    def __iter__(self):
        if "SIGNALLED" in os.environ:
            os.kill(os.getpid(), signal.SIGTERM)
        for begin in range(0, 40, 8):
            rows = PAIRS[begin : begin + 8]
            yield tuple(torch.stack(column) for column in zip(*rows, strict=True))


class SignalledAtTheBeginning(Callback):
    def on_train_begin(self, trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def starts(folder, where: str, comes: bool):
    """Return a trainer to which a signal comes before its first step."""
    dataset = SignalledWhenReadAgain() if where == "replay" else PAIRS
    parts = {}
    if comes and where == "verify":
        parts["storage"] = SignalledWhenRead(folder)
    if comes and where == "begin":
        parts["callbacks"] = [SignalledAtTheBeginning()]
    return small_trainer(folder, dataset=dataset, trainer=parts, max_steps=4)


@pytest.mark.parametrize("where", ["verify", "replay", "begin"])
def test_a_signal_before_the_first_step_ends_the_start_and_changes_nothing(
    where, tmp_path, monkeypatch
):
    whole = starts(tmp_path / "whole", where, comes=False)
    whole.train()
    starts(tmp_path / "run", where, comes=False).train()
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    monkeypatch.setenv("SIGNALLED", "yes")
    with pytest.raises(TrainingStopped, match="before the first step: run the same command") as end:
        starts(tmp_path / "run", where, comes=True).train()
    monkeypatch.delenv("SIGNALLED")
    assert (end.value.step, end.value.reason, end.value.code) == (None, "SIGTERM", EXIT_STOPPED)
    assert steps_in(tmp_path / "run") == [0, 2]
    resumed = starts(tmp_path / "run", where, comes=False)
    assert resumed.train().resume_report.step == 2
    assert bits(resumed.model) == bits(whole.model)


class SwallowedSignal:
    """An object whose destructor is interrupted: Python prints what it raises, and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_destructor_swallowed_still_ends_the_start():
    with Preemption(clock=time.monotonic, environment={}) as preemption:
        SwallowedSignal()
        with pytest.raises(TrainingStopped):
            preemption.training_begins()


def test_a_second_signal_does_not_interrupt_the_end_of_a_start():
    with Preemption(clock=time.monotonic, environment={}):
        with pytest.raises(TrainingStopped):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # while its files are being closed


class Clocks:
    """A clock that a callback moves on by ten seconds a step."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class TenSecondSteps(Callback):
    def __init__(self, clock: Clocks) -> None:
        self.clock = clock

    def on_step_end(self, trainer) -> None:
        self.clock.now += 10


def stopped(folder, **settings) -> TrainingStopped:
    clock = Clocks()
    parts = {"callbacks": [TenSecondSteps(clock)], "clock": clock, "wall_clock": clock}
    with pytest.raises(TrainingStopped) as raised:
        small_trainer(folder, max_steps=100, trainer=parts, **settings).train()
    return raised.value


def test_max_time_stops_before_the_time_is_over(tmp_path):
    error = stopped(tmp_path, max_time=35)
    assert (error.reason, error.step, error.code) == ("max_time", 3, EXIT_STOPPED)


def test_the_end_of_a_slurm_job_is_seen_coming(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1055")
    error = stopped(tmp_path)
    assert error.reason == "SLURM_JOB_END_TIME"
    assert 3 <= error.step <= 5
    assert max(steps_in(tmp_path)) == error.step


def test_a_slurm_end_time_that_is_no_number_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", "noon")
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME"):
        small_trainer(tmp_path).train()


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    small_trainer(tmp_path).train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_seconds_of_all_segments_are_counted_together(tmp_path):
    clock = Clocks()
    parts = {"callbacks": [TenSecondSteps(clock)], "clock": clock, "wall_clock": time.time}
    for steps in (2, 5):
        trainer = small_trainer(tmp_path, max_steps=steps, trainer=parts)
        trainer.train()
    assert trainer.statistics.seconds == 50.0
