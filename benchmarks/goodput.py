"""Useful steps per second of a run that is killed at random: ours beside peers, at their best.

    python benchmarks/goodput.py [--quick] [--seconds 90] [--between-kills 22.5] [--methods ...]

GPT-2 124M with AdamW, one sample a step. Each method first trains for a while undisturbed: from
that come its step time and what a save costs it, and so its best interval between saves (Young,
Daly: `unbroken.goodput.best_interval`; at least twice what a save takes until it is there). Then
it trains for a given time. SIGKILL comes at random moments, with exponential gaps, the same for
all; a killed run is started again at once. A start that fails on a checkpoint that a kill left
broken is what its operator would do about it: that checkpoint is removed, and the run started
again. *steps* is what the run has reached when the time is over, *goodput* that in the time of its
undisturbed steps.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

from gpt2 import gpt2
from machine import users_environment
from protocol import Protocol
from trainers import TRAINERS, Work, module_of

SEED = 0
SAVES_TO_CALIBRATE, STEPS_BETWEEN = 4, 4


@dataclass(frozen=True)
class Plan:
    """How long a run lasts, and how often it is killed; in seconds."""

    seconds: float
    between_kills: float
    quick: bool

    def kills(self) -> list[float]:
        """Return the moments of kills since the beginning, and the end.

        Gaps are exponential, and scaled so that just the expected number falls into the time.
        """
        draw = random.Random(SEED)
        gaps = [draw.expovariate(1.0) for _ in range(round(self.seconds / self.between_kills) + 1)]
        return [moment / sum(gaps) * self.seconds for moment in accumulate(gaps)]


class Steps:
    """Tells of each step, in a file, which a kill leaves as it is."""

    def __init__(self, file: Path) -> None:
        self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, step: int) -> None:
        os.write(self._fd, f"{step} {time.time()}\n".encode())


def train(name: str, folder: str, max_steps: int, save_steps: int, quick: bool) -> None:
    on_step = Steps(Path(folder) / "steps")
    model = lambda: gpt2(quick=quick)  # noqa: E731
    work = Work(Path(folder) / "run", model, max_steps, save_steps, keep=2, on_step=on_step)
    module_of(name).train(work)
    os._exit(0)


def launch(name: str, folder: Path, max_steps: int, save_steps: int, quick: bool):
    """Start a training in a process of its own; return what `wait` and `kill` take."""
    if quick:
        arguments = (name, str(folder), max_steps, save_steps, quick)
        process = multiprocessing.get_context("fork").Process(target=train, args=arguments)
        process.start()
        return process
    words = ["train", name, str(folder), str(max_steps), str(save_steps)]
    command = [sys.executable, "-W", "ignore", __file__, *words]
    with (folder / "output").open("a") as output:
        environment = users_environment()
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def wait(process, until: float) -> int | None:
    """Return the exit status, or None if it runs at that time still."""
    while time.monotonic() < until:
        status = process.exitcode if hasattr(process, "exitcode") else process.poll()
        if status is not None:
            return status
        time.sleep(0.01)
    return None


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join() if hasattr(process, "join") else process.wait()


def steps_in(folder: Path) -> list[tuple[int, float]]:
    """Return the steps in their order, with the time when each was over."""
    file = folder / "steps"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(step), float(when)) for step, when in (line.split() for line in lines)]


def calibrate(name: str, folder: Path, plan: Plan) -> dict[str, float]:
    """Return the seconds of a step, what a save takes from the training, and until it is there."""
    folder.mkdir()
    last = SAVES_TO_CALIBRATE * STEPS_BETWEEN
    status = wait(launch(name, folder, last, STEPS_BETWEEN, plan.quick), math.inf)
    told = dict(steps_in(folder))
    if status != 0 or max(told, default=0) != last:
        output = folder / "output"
        raise SystemExit(f"{name}: ended with {status}\n{output.exists() and output.read_text()}")
    seconds = {after: told[after] - told[before] for before, after in pairwise(sorted(told))}
    step = median(seconds.values())
    window = [seconds[number] for number in range(STEPS_BETWEEN + 2, last)]  # from the 1st save on
    lost = (sum(window) - step * len(window)) / (SAVES_TO_CALIBRATE - 2)
    there = [
        last_change(made) - told[int(made.stem.rpartition("-")[2])]
        for made in module_of(name).checkpoints(folder / "run")
    ]
    return {"step": step, "lost": max(lost, step / 100), "save": max(*there, 0.0)}


def last_change(made: Path) -> float:
    return max(one.stat().st_ctime for one in (made, *made.rglob("*")))


def save_interval(found: dict[str, float], plan: Plan) -> int:
    """Return the steps between saves that make goodput largest."""
    from unbroken.goodput import best_interval

    seconds = max(best_interval(found["lost"], plan.between_kills), 2 * found["save"])
    return max(1, round(seconds / found["step"]))


def run(name: str, folder: Path, save_steps: int, plan: Plan) -> dict[str, float]:
    """Train for a given time, killed at given moments; return what came of it."""
    folder.mkdir()
    began, starts, broken, lines = time.monotonic(), 0, 0, 0
    for moment in plan.kills():
        while True:
            lines = len(steps_in(folder))
            process = launch(name, folder, 1_000_000, save_steps, plan.quick)
            starts += 1
            if wait(process, began + moment) is None:
                break
            broken += 1
            remove_newest(name, folder)
        kill(process)
    steps = steps_in(folder)
    reached = steps[-1][0] if len(steps) > lines else stored(name, folder)
    return {"steps": reached, "repeated": len(steps) - reached, "starts": starts, "broken": broken}


def stored(name: str, folder: Path) -> int:
    """Return the step at which the run would go on."""
    made = module_of(name).checkpoints(folder / "run")
    return int(made[-1].stem.rpartition("-")[2]) if made else 0


def remove_newest(name: str, folder: Path) -> None:
    made = module_of(name).checkpoints(folder / "run")
    if not made:
        raise SystemExit(f"{name}: does not start\n{(folder / 'output').read_text()}")
    shutil.rmtree(made[-1]) if made[-1].is_dir() else made[-1].unlink()


def measure(name: str, plan: Plan) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        found = calibrate(name, Path(folder) / "calibration", plan)
        shutil.rmtree(Path(folder) / "calibration")
        found["save_steps"] = save_interval(found, plan)
        found |= run(name, Path(folder) / "killed", int(found["save_steps"]), plan)
    per_second = found["steps"] / plan.seconds
    return {**found, "steps_per_second": per_second, "goodput": per_second * found["step"]}


def conclude(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return our steps over each peer's."""
    ours = medians.get("unbroken", {}).get("steps")
    return {
        f"steps over those of {name}": ours / one["steps"]
        for name, one in medians.items()
        if ours is not None and name != "unbroken" and one["steps"]
    }


def main() -> None:
    protocol = Protocol(
        __file__,
        __doc__,
        lambda name, quick: measure(name, plan),
        TRAINERS,
        rounds=1,
        starts_processes=True,
        numbers={"seconds": 90.0, "between_kills": 22.5},
    )
    given = protocol.given
    plan = Plan(given.seconds, given.between_kills, quick=False)
    if protocol.quick:
        plan = Plan(seconds=2.0, between_kills=0.8, quick=True)
        for name in TRAINERS:
            module_of(name)
    protocol.run(conclude)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "train":
        _, _, name, folder, max_steps, save_steps = sys.argv
        train(name, folder, int(max_steps), int(save_steps), False)
    main()
