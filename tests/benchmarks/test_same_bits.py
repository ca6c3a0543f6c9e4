"""What the digests of runs are compared with, and that a run is made as it is written there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ONE = {"weights": "a", "optimizer": "b"}


@pytest.fixture
def same_bits(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import same_bits

    return same_bits


def test_runs_with_the_bits_of_the_reference_pass(same_bits, capsys):
    reference = {"machine": same_bits.machine(), "runs": {"one": ONE, "not made now": ONE}}
    assert same_bits.compared({"one": ONE}, reference) == 0
    assert capsys.readouterr().out == "1 of 1 runs have the bits of the reference\n"


@pytest.mark.parametrize("what", ONE)
def test_other_bits_are_told_by_the_name_of_their_run(what, same_bits, capsys):
    reference = {"machine": same_bits.machine(), "runs": {"one": ONE, "two": {**ONE, what: "c"}}}
    assert same_bits.compared({"one": ONE, "two": ONE}, reference) == 1
    assert f"OTHER BITS: two: {what}\n" in capsys.readouterr().out


def test_other_bits_of_another_machine_say_nothing(same_bits, capsys):
    there = {**same_bits.machine(), "torch": "2.0"}
    assert same_bits.compared({"one": ONE}, {"machine": there, "runs": {"one": {}}}) == 2
    assert "torch: 2.0 there" in capsys.readouterr().out


def test_the_reference_has_every_run_and_no_other(same_bits):
    assert set(json.loads(same_bits.REFERENCE.read_text())["runs"]) == set(same_bits.RUNS)


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_digested(tmp_path):
    script, file = BENCHMARKS / "same_bits.py", tmp_path / "bits.json"
    command = [sys.executable, script, "--only", "loop, unfinished windows", "--write", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())["runs"]["loop, unfinished windows"]
    assert [len(one) for one in found.values()] == [64, 64]
