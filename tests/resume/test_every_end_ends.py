"""However a script ends, its process and its workers are gone soon, with the right status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from small_trainers import steps_in
from unbroken.checkpoint import EXIT_STOPPED

SCRIPT = Path(__file__).with_name("scripts") / "ends.py"
SECONDS = 60  # an end that is none takes for ever; a start on a busy machine, 20 s

INTERRUPTED = -signal.SIGINT
TURNS = ("turns of steps", "turns of epochs")
QUICK = 2.0  # seconds; 0.6 to 0.8 of them are the interpreter's own, with torch loaded
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


def timed(folder, way: str, end: str, workers: int) -> tuple[int, str, float]:
    """Return status, output, and the seconds from the last line to the end of all processes."""
    status, output = run(folder, way, end, workers)
    gone = time.monotonic()
    return status, output, gone - float(output.rsplit("LAST ", 1)[1].split()[0])


def status_of(way: str, end: str) -> int:
    """Return how it must end: as asked to be started again, but where a loop knows no signals."""
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
        ("turns of steps", "SIGTERM", 2),
        ("turns of epochs", "error", 2),
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
@pytest.mark.parametrize("end", [*(one for one in STATUSES if one != "SIGKILL"), *STOPS, "break"])
@pytest.mark.parametrize(("way", "workers"), [*product(TURNS, (0, 2))])
def test_a_loop_over_turns_ends_soon_after_its_last_save(way, end, workers, tmp_path):
    status, output, seconds = timed(tmp_path, way, end, workers)
    assert status == (0 if end == "break" else status_of(way, end)), output
    if seconds >= QUICK:  # a busy machine: a script without this library takes as long there
        assert seconds < 2 * timed(tmp_path, "stock", "normal", workers)[2]


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
