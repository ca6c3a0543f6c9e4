"""However a script ends, its process and its workers are gone soon, with the right status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from small_trainers import steps_in
from unbroken.checkpoint import EXIT_STOPPED

SCRIPT = Path(__file__).with_name("scripts") / "ends.py"
SECONDS = 60  # an end that is none takes for ever; a start on a busy machine, 20 s

INTERRUPTED = -signal.SIGINT
STATUSES = {"normal": 0, "error": 1, "exit": 7, "SIGKILL": -9, "SIGINT SIGINT": INTERRUPTED}
STOPS = ("SIGTERM", "SIGTERM SIGTERM", "SIGUSR1", "SIGINT")
WAYS = ("trainer", "drop-in", "drop-in persistent", "loop", "loop with", "loop loader")


def run(folder, way: str, end: str, workers: int, context: str = "fork") -> tuple[int, str]:
    """Return status and output once no process is left: the workers hold the output, too."""
    command = [sys.executable, str(SCRIPT), str(folder), way, end, str(workers), context]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, output


def status_of(way: str, end: str) -> int:
    """Return how it must end: Trainers save and say "start me again", loops know no signals."""
    end = end.removeprefix("hangs ")
    if end not in STOPS:
        return STATUSES[end]
    return -getattr(signal, end.split()[0]) if way.startswith("loop") else EXIT_STOPPED


@pytest.mark.parametrize(
    ("way", "end", "workers"),
    [
        ("trainer", "SIGTERM SIGTERM", 2),
        ("trainer", "hangs error", 2),
        ("drop-in", "SIGTERM SIGTERM", 2),
        ("drop-in persistent", "normal", 2),
        ("drop-in evaluating", "SIGTERM", 2),
        ("loop", "normal", 2),
        ("loop with", "SIGINT", 2),
        ("loop loader", "hangs SIGKILL", 2),
    ],
)
def test_a_process_ends_with_its_workers_and_the_right_status(way, end, workers, tmp_path):
    status, output = run(tmp_path, way, end, workers)
    assert status == status_of(way, end), output
    assert "exited unexpectedly" not in output
    assert end == "hangs SIGKILL" or 2 in steps_in(tmp_path)  # its save was on the way
    assert status != EXIT_STOPPED or f"step {steps_in(tmp_path)[-1]}; saved" in output


@pytest.mark.sweep
@pytest.mark.parametrize("end", [*STATUSES, *STOPS, "hangs error", "hangs SIGINT SIGINT"])
@pytest.mark.parametrize(("way", "workers"), [*product(WAYS, (0, 2))])
def test_every_way_of_training_comes_to_every_end(way, end, workers, tmp_path):
    hangs = end.startswith("hangs")
    status, output = run(tmp_path, way, end.removeprefix("" if workers else "hangs "), workers)
    assert status == status_of(way, end), output
    assert hangs or "exited unexpectedly" not in output


@pytest.mark.sweep
@pytest.mark.parametrize("end", STOPS)
@pytest.mark.parametrize("way", ["trainer evaluating", "drop-in evaluating"])
def test_a_signal_while_workers_evaluate_saves_too(way, end, tmp_path):
    status, output = run(tmp_path, way, end, 2)
    assert (status, "; saved: run the same command" in output) == (EXIT_STOPPED, True), output


@pytest.mark.sweep
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
@pytest.mark.parametrize("end", ["normal", "error", "SIGTERM", "SIGINT", "hangs SIGKILL"])
@pytest.mark.parametrize("way", ["loop loader", "loop with", "drop-in", "drop-in persistent"])
def test_workers_that_are_spawned_end_too(way, end, context, tmp_path):
    status, output = run(tmp_path, way, end, 2, context)
    assert status == status_of(way, end), output


@pytest.mark.sweep
@pytest.mark.parametrize("end", ["SIGTERM", "SIGUSR1", "SIGINT"])
@pytest.mark.parametrize(
    ("way", "context"), [*product(("trainer", "drop-in"), ("spawn", "forkserver"))]
)
def test_a_signal_while_workers_start_in_the_middle_of_a_run_saves_too(way, context, end, tmp_path):
    status, output = run(tmp_path / "run", f"{way} starting", end, 2, context)
    assert (status, "; saved: run the same command" in output) == (EXIT_STOPPED, True), output
    assert steps_in(tmp_path / "run")[-1] in (2, 3)
