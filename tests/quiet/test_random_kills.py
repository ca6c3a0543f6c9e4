"""A correct run that is killed at random moments is the same run, and no start raises an alarm."""

from __future__ import annotations

import math
import random
import signal
import time
from pathlib import Path

import pytest

from distributed.ranks import run_ranks
from fresh import fresh_process
from quiet.programs import OF_RANKS, PROGRAMS
from quiet.running import alone, left_beside, on_two_ranks, run, start

KILLS = 5  # of each program: more than 300 of all
ALARM = "not repeated with the same bits"
CASES = {name: (text, alone) for name, text in PROGRAMS.items()}
CASES |= {name: (text, on_two_ranks) for name, text in OF_RANKS.items()}
PLAIN = "Checkpointer(FOLDER, save_steps=4, "
for mode in ("async", "overlap"):
    policy = f'__import__("unbroken").SavePolicy(steps=4, mode="{mode}")'
    CASES |= {
        f"{name}, {mode}": (text.replace(PLAIN, f"Checkpointer(FOLDER, save={policy}, "), how)
        for name, (text, how) in [*CASES.items()]
        if PLAIN in text
    }


def killed_after(seconds: float, how):
    """Return a way to start a script that kills all its processes after so many seconds."""

    def alone_until(script: str, folder: str, kill_at: int) -> list[int]:
        process = fresh_process(start, script, folder, kill_at)
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return [process.exitcode]

    def ranks_until(script: str, folder: str, kill_at: int) -> list[int]:
        return run_ranks(start, script, folder, kill_at, timeout=seconds)

    return alone_until if how is alone else ranks_until


class Killed:
    """A program that is killed at random moments, and started again until it has ended."""

    def __init__(self, name: str, folder: Path) -> None:
        self.program, self.how = CASES[name]
        self.draw, self.folder = random.Random(name), folder
        self.kills, self.runs = 0, 0
        self.whole, self.seconds = self.start_in("whole"), math.inf
        for one in ("warm", "again"):
            began = time.monotonic()
            assert self.start_in(one)["digest"] == self.whole["digest"]
            self.seconds = min(self.seconds, time.monotonic() - began)

    def start_in(self, folder: str, how=None) -> dict:
        (self.folder / folder).mkdir(exist_ok=True)
        for rank in ("", "0", "1"):  # one that is killed at once writes nothing
            Path(f"{left_beside(str(self.folder / folder / 'train.py'), rank)}.txt").touch()
        found = run(self.program, self.folder / folder, how=how or self.how)
        assert ALARM not in found["output"], found
        assert "error" not in found, found
        return found

    def run_until_it_ends(self) -> None:
        self.runs += 1
        found = {"status": -signal.SIGKILL}
        while self.kills < KILLS and found["status"] not in (0, [0, 0]):
            until = killed_after(self.draw.uniform(0.1, 0.9) * self.seconds, self.how)
            found = self.start_in(f"run-{self.runs}", until)
            self.kills += found["status"] not in (0, [0, 0])
        found = self.start_in(f"run-{self.runs}")
        assert found["verdict"] == "exact", found
        assert found["digest"] == self.whole["digest"], found


@pytest.mark.sweep
@pytest.mark.parametrize("name", CASES)
def test_random_kills_change_no_bit_and_raise_no_alarm(name, tmp_path):
    killed = Killed(name, tmp_path)
    while killed.kills < KILLS:
        killed.run_until_it_ends()
