"""How everything is measured: rounds in which each method has a process, and who is first rotates.

With --quick the model is tiny, there is one round, and processes are forked: to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType

from machine import RESULTS, measured_in_a_fresh_process, write

Found = Mapping[str, Sequence[Mapping[str, float]]]


class Protocol:
    """One benchmark's command line, and its rounds.

    Args:
        script: Its file, whose name is that of its results.
        about: Its docstring.
        measure: Called with the name of a method and whether to be quick, in a process of its own.
        methods: Their names.
        rounds: How many, unless the command line says it.
        threads: Threads that compute, unless the command line says it; None: as many as cores.
        starts_processes: `measure` has its own processes, and needs none.
        numbers: More options, with what they are unless the command line says it.
    """

    def __init__(
        self,
        script: str,
        about: str | None,
        measure: Callable[[str, bool], Mapping[str, float]],
        methods: Sequence[str],
        *,
        rounds: int,
        threads: int | None = None,
        starts_processes: bool = False,
        numbers: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._script, self._measure = script, measure
        self._starts_processes = starts_processes
        parser = argparse.ArgumentParser(
            description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--methods", nargs="*", default=methods, metavar="METHOD")
        parser.add_argument("--threads", type=int, default=threads or os.cpu_count())
        parser.add_argument("--quick", action="store_true", help="only to see that it runs")
        parser.add_argument("--results", type=Path, help="the folder for the result")
        for name, value in numbers.items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
        if not starts_processes:
            parser.add_argument("--measure", metavar="METHOD", help="one alone, and print it")
        self._numbers = tuple(numbers)
        self.given = parser.parse_args()
        self.quick: bool = self.given.quick
        if self.quick:
            self.given.threads = 1
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        os.environ["OMP_NUM_THREADS"] = str(self.given.threads)
        if unknown := set(self.given.methods) - set(methods):
            parser.error(f"no such method: {sorted(unknown)}; there are: {', '.join(methods)}")

    def run(self, conclude: Callable[[Mapping[str, Mapping[str, float]]], Mapping]) -> None:
        """Measure, print and write; `conclude` makes ratios and the like of the medians."""
        if getattr(self.given, "measure", None) is not None:
            print("\n" + json.dumps(self._measure(self.given.measure, self.quick)), flush=True)
            os._exit(0)  # gloo and the helpers of peers may not survive the end of an interpreter
        found = self.rounds()
        medians = {
            method: {key: median(one[key] for one in all_of_it) for key in all_of_it[0]}
            for method, all_of_it in found.items()
        }
        conclusions = conclude(medians)
        for method, one in medians.items():
            print(f"{method:42}", *(f"{key} {value:.3g}" for key, value in one.items()), sep="  ")
        for name, value in conclusions.items():
            print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
        names = ("rounds", "threads", "quick", *self._numbers)
        given = {name: getattr(self.given, name) for name in names}
        result = {**given, "conclusions": conclusions, "medians": medians, "all": found}
        write(Path(self._script).stem, result, self._folder())

    def _folder(self) -> Path:
        if self.given.results is not None:
            return self.given.results
        return Path(tempfile.mkdtemp()) if self.quick else RESULTS

    def rounds(self) -> dict[str, list[dict[str, float]]]:
        methods = list(self.given.methods)
        found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for number in range(1 if self.quick else self.given.rounds):
            first = number % len(methods)  # nobody always runs after the same other
            for method in methods[first:] + methods[:first]:
                found[method].append(self._in_a_process(method))
                print(method, found[method][-1], flush=True)
        return found

    def _in_a_process(self, method: str) -> dict[str, float]:
        if self._starts_processes:
            return dict(self._measure(method, self.quick))
        if self.quick:
            return in_a_fork(self._measure, method, True)
        more = ("--measure", method, "--threads", self.given.threads)
        return measured_in_a_fresh_process(self._script, *more, threads=self.given.threads)


def in_a_fork(measure: Callable[..., Mapping[str, float]], *arguments: object) -> dict[str, float]:
    """Call a function in a fork of this process, which has imported what it needs."""
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()

    def run() -> None:
        its.send(dict(measure(*arguments)))
        its.close()
        os._exit(0)

    process = context.Process(target=run)
    process.start()
    its.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{arguments}: has failed") from None
    finally:
        process.join()
