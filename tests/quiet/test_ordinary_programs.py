"""Ordinary programs resume as exact, with the uninterrupted run's bits, and with no new line."""

from __future__ import annotations

import signal

import pytest

from quiet.programs import PROGRAMS
from quiet.running import run

KILLED_AT, SAVED_AT = 10, 8
SAID_AT_EACH_RESUME = (
    *("resuming from", "took over from a process that died", "step "),
    *("DataLoader: reading and skipping", "skipped "),  # what it costs to read an epoch again
)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_it_resumes_exactly_and_nothing_is_said(program, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run(program, tmp_path / "whole")
    assert whole["status"] == 0, whole["output"]
    killed = run(program, tmp_path / "killed", KILLED_AT)
    assert killed["status"] == -signal.SIGKILL, killed["output"]
    resumed = run(program, tmp_path / "killed")
    assert (resumed["verdict"], resumed["step"]) == ("exact", SAVED_AT), resumed
    assert (resumed["differences"], resumed["notes"]) == ([], [])
    assert resumed["digest"] == whole["digest"]
    new = [
        line
        for line in resumed["output"].splitlines()
        if line.strip() and not line.startswith(SAID_AT_EACH_RESUME)
    ]
    assert new == []


def test_thirty_programs_are_tried():
    assert len(PROGRAMS) >= 30
