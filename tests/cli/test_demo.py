"""The demo itself: real trainings, real kills; and that it can fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.sample_run import in_a_process
from unbroken.cli.demo import run_demo

pytestmark = pytest.mark.slow


def processes_in(folder):
    """Return the processes whose current directory is this folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            found += [link.parent.name] if os.readlink(link) == str(folder) else []
        except OSError:
            continue
    return found


def test_the_demo_shows_that_the_killed_run_is_the_same_run(tmp_path):
    ended = in_a_process(
        "demo", "--steps", 12, "--kills", 3, "--keep", tmp_path / "demo", cwd=tmp_path, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "inside the save of checkpoint-" in ended.stdout
    assert "The killed run is the same run, bit for bit." in ended.stdout
    assert ended.stdout.count("the same\n") >= 7
    assert processes_in(tmp_path / "demo") == []


def test_the_demo_fails_when_the_killed_run_is_another_one(tmp_path, capsys):
    status = run_demo(
        keep=str(tmp_path), steps=12, kills=1, seed=1, killed_arguments=("--data-seed", "7")
    )
    assert status == 1
    assert "NOT THE SAME" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_process(tmp_path, number):
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "unbroken", "demo", "--keep", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as demo:
        deadline = time.monotonic() + 60
        while not (folder / "uninterrupted" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            with pytest.raises(subprocess.TimeoutExpired):
                demo.wait(timeout=0.05)
        demo.send_signal(number)
        _, errors = demo.communicate(timeout=60)
    assert (demo.returncode, errors) == (130, b"interrupted\n")
    assert processes_in(folder) == []
