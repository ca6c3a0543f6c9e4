"""What the recorder of `unbroken check` costs a training step: every byte, and samples.

    python benchmarks/check_overhead.py [--rounds 8] [--size small]

The protocol is that of step_overhead.py: the bare loop on one core, one process a measurement, the
order rotated; a process's figure is the median of its steps. Stated is the median over the rounds of
the time of a step over that of the bare loop of the same round, and the recorder's own clock.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from statistics import median, quantiles

from machine import measured_in_a_fresh_process, write
from step_overhead import Watch, bare

from unbroken.check.recorder.plan import Plan
from unbroken.check.recording import read_recordings

METHODS = ("bare", "full", "sampled")
ENTRY = Path(__file__).parents[1] / "src/unbroken/check/entry"


def measure(size: str) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    watch = Watch(size)
    bare(size, watch, "")
    print(json.dumps({"seconds": watch.seconds_per_step()}))


def measured(method: str, size: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("UNBROKEN_CHECK_PLAN", "PYTHONPATH"):
            os.environ.pop(name, None)
        if method != "bare":
            plan = Path(folder) / "plan.json"
            Plan(folder, digests=method).write(plan)
            os.environ.update(UNBROKEN_CHECK_PLAN=str(plan), PYTHONPATH=str(ENTRY))
        seconds = measured_in_a_fresh_process(__file__, "--measure", size)["seconds"]
        recordings = read_recordings(Path(folder))
        own = recordings[0].overhead if recordings else 0.0
    return {"seconds": seconds, "own": own}


def compare(size: str, rounds: int) -> dict:
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for number in range(rounds):
        first = number % len(METHODS)
        for method in METHODS[first:] + METHODS[:first]:
            found[method].append(measured(method, size))
    return {method: summary(found, method) for method in METHODS}


def summary(found: dict[str, list[dict[str, float]]], method: str) -> dict:
    pairs = zip(found["bare"], found[method], strict=True)
    ratios = [own["seconds"] / base["seconds"] - 1 for base, own in pairs]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {
        "seconds_per_step": median(one["seconds"] for one in found[method]),
        "overhead": {"lower_quartile": low, "median": middle, "upper_quartile": high},
        "by_its_own_clock": median(one["own"] for one in found[method]),
        "all": found[method],
    }


def show(size: str, result: dict) -> None:
    for method in METHODS:
        one, spread = result[method], result[method]["overhead"]
        print(
            f"{size:6} {method:8} {one['seconds_per_step'] * 1e3:8.2f} ms a step, overhead "
            f"{spread['median']:7.2%} [{spread['lower_quartile']:.2%}, "
            f"{spread['upper_quartile']:.2%}], by its own clock {one['by_its_own_clock']:.2%}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--size", choices=("tiny", "small"), default="small")
    parser.add_argument("--measure", choices=("tiny", "small"))
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
    else:
        result = compare(arguments.size, arguments.rounds)
        show(arguments.size, result)
        write("check_overhead", {arguments.size: result, "rounds": arguments.rounds})
