"""What the recorder of `unbroken check` costs a training step: every byte, and samples.

    python benchmarks/check_overhead.py [--rounds 6]

The loop is the bare one of step_overhead.py, on one core. In each process the recorder looks at
every other step: the steps between are the measure for those beside them, so that other work on
the machine weighs on both alike. A process's figure is the median of its pairs' ratios; stated
are the quartiles over the rounds. What the replaced functions cost where the recorder does not
look, a Python call for each module, is in both; `untouched` is the loop without the recorder.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from statistics import median, quantiles

from machine import measured_in_a_fresh_process, write
from step_overhead import SIZES, bare

METHODS = ("full", "sampled", "untouched")
FIRST = 6


class Alternate:
    """Lets the recorder look at every other step, and times all of them."""

    def __init__(self, recorder) -> None:
        self.recorder = recorder
        self.looked: list[float] = []
        self.blind: list[float] = []
        self.began = 0.0

    def step(self, step: int) -> None:
        now = time.perf_counter()
        if step > FIRST:
            (self.looked if step % 2 == 0 else self.blind).append(now - self.began)
        if self.recorder is not None and step >= FIRST:
            self.recorder._is_blind = step % 2 == 0  # for the step that follows
        self.began = time.perf_counter()

    def result(self) -> dict[str, float]:
        pairs = list(zip(self.looked, self.blind, strict=False))
        return {
            "seconds": median(self.blind),
            "overhead": median(looked / blind - 1 for looked, blind in pairs),
        }


def measure(method: str, size: str) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from unbroken.recorder.protocol import RecordPlan
    from unbroken.recorder.recorder import Recorder

    with tempfile.TemporaryDirectory() as folder:
        recorder = None
        if method != "untouched":
            recorder = Recorder(RecordPlan(folder, digests=method))
            recorder.attach()
        alternate = Alternate(recorder)
        bare(size, alternate, folder)
    print(json.dumps(alternate.result()))


def compare(size: str, rounds: int) -> dict:
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for number in range(rounds):
        first = number % len(METHODS)
        for method in METHODS[first:] + METHODS[:first]:
            one = measured_in_a_fresh_process(__file__, "--measure", method, size)
            found[method].append(one)
    return {method: summary(all_of_it) for method, all_of_it in found.items()}


def summary(found: list[dict[str, float]]) -> dict:
    low, middle, high = quantiles([one["overhead"] for one in found], n=4, method="inclusive")
    return {
        "seconds_per_step": median(one["seconds"] for one in found),
        "overhead": {"lower_quartile": low, "median": middle, "upper_quartile": high},
        "all": found,
    }


def show(size: str, result: dict) -> None:
    for method, one in result.items():
        low, middle, high = one["overhead"].values()
        print(
            f"{size:6} {method:10} {one['seconds_per_step'] * 1e3:8.2f} ms a step, overhead "
            f"{middle:6.2%} [{low:.2%}, {high:.2%}]"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "SIZE"))
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
    else:
        results = {size: compare(size, arguments.rounds) for size in SIZES}
        for size, result in results.items():
            show(size, result)
        write("check_overhead", {"rounds": arguments.rounds, "sizes": results})
