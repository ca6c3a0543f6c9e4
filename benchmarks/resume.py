"""From the start of a process to its first resumed step, at the start and deep in the data.

    python benchmarks/resume.py [--quick] [--rounds 3] [--methods METHOD ...]

GPT-2 124M with AdamW on a data set of a million samples, one of them in each step; the checkpoint
is one of step 10 or of step 100,000. Before each start it is dropped from the page cache. The
*floor* is what no trainer can leave out: Python, the imports of torch and of the model, making the
model, a direct read of a checkpoint of ours, and one training step. Phases, in seconds of their
own: *python* starts, *imports* (of torch, the model and the trainer), *model* (it is made),
*resume* (the rest until the first forward pass begins), *step* (the first one). *total* is their
sum; *computing* is the processor's time in it, of all threads. *unbroken, late* is ours with a
function that imports the model's library, too, in the phase *model*: meanwhile the checkpoint is
read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

STARTED = float(os.environ.get("BENCHMARK_STARTED", "nan"))
MARKS = {"start": STARTED, "python": time.monotonic()}

from disk import bare_read, make_cold  # noqa: E402
from gpt2 import gpt2  # noqa: E402
from machine import users_environment  # noqa: E402
from protocol import Protocol, in_a_fork  # noqa: E402
from trainers import TRAINERS, Work, module_of  # noqa: E402

DEPTHS = (10, 100_000)
FLOOR = "floor"
LATE = ", late"
METHODS = (
    FLOOR,
    *(f"{name}, {depth}" for name in TRAINERS for depth in DEPTHS),
    f"unbroken{LATE}, {DEPTHS[1]}",
)


def mark(name: str) -> None:
    MARKS.setdefault(name, time.monotonic())


def work_in(place: Path, method: str, depth: int, *, quick: bool) -> Work:
    def model():
        made = gpt2(quick=quick)
        mark("model")
        return made

    return Work(place / method, model, depth + 100, save_steps=None)


def prepare(place: Path, method: str, quick: bool) -> dict[str, float]:
    name, _, depth = method.rpartition(", ")
    work = work_in(place, method, int(depth), quick=quick)
    work.folder.mkdir(parents=True)
    module_of(name.removesuffix(LATE)).deepen(work, int(depth))
    return {}


def start(place: Path, method: str, quick: bool) -> dict[str, float]:
    """Go on from what was prepared, as far as the end of the first step; return the phases."""
    if method == FLOOR:
        return start_floor(place, quick)
    name, _, depth = method.rpartition(", ")
    trainer = module_of(name.removesuffix(LATE))
    from torch.nn.modules.module import register_module_forward_pre_hook

    if not name.endswith(LATE):
        from transformers import GPT2LMHeadModel  # noqa: F401 (else the first model imports it)

    mark("imports")
    register_module_forward_pre_hook(lambda *_: mark("resume"))
    work = replace(work_in(place, method, int(depth), quick=quick), on_step=End(int(depth)))
    try:
        trainer.train(work)
    except EndOfFirstStepError:
        return phases()
    raise SystemExit(f"{method}: no step was taken")


class EndOfFirstStepError(BaseException):
    pass


class End:
    """Ends a run with its first step, which must be the one after those of the checkpoint."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __call__(self, step: int) -> None:
        mark("step")
        if step != self.depth + 1 and step != self.depth + 2:  # drop_in: its own one follows
            raise SystemExit(f"resumed at step {step}, not after {self.depth}")
        raise EndOfFirstStepError


def start_floor(place: Path, quick: bool) -> dict[str, float]:
    import torch
    from transformers import GPT2LMHeadModel  # noqa: F401

    mark("imports")
    model = gpt2(quick=quick)
    mark("model")
    for made in place.glob("unbroken, */checkpoint-*"):
        bare_read(made)
        break
    mark("resume")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inputs = torch.arange(128).view(1, 128)
    model.train()
    model(input_ids=inputs, labels=inputs).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    mark("step")
    return phases()


def phases() -> dict[str, float]:
    """Return the seconds of each phase."""
    names, times = list(MARKS), list(MARKS.values())
    found = {
        name: end - begin for name, (begin, end) in zip(names[1:], pairwise(times), strict=True)
    }
    return {**found, "total": times[-1] - times[0], "computing": time.process_time()}


TASKS = {"prepare": prepare, "start": start}


def do(task: str, place: Path, method: str, quick: bool) -> dict[str, float]:
    """Do a task in a process of its own; a quick one in a fork."""
    if quick:
        MARKS.clear()
        MARKS["start"] = time.monotonic()
        return in_a_fork(TASKS[task], place, method, True)
    command = [sys.executable, "-W", "ignore", __file__, task, str(place), method]
    environment = {**users_environment(), "BENCHMARK_STARTED": str(time.monotonic())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{task}: {method}\n{done.stdout}\n{done.stderr}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def measure(method: str, quick: bool) -> dict[str, float]:
    place = Path(os.environ["BENCHMARK_PLACE"])
    make_cold(place)
    return do("start", place, method, quick)


def conclude(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what each start takes over the floor, and ours over the peers'."""
    floor = medians[FLOOR]["total"] if FLOOR in medians else None
    found = {}
    for method, one in medians.items():
        if floor is not None and method != FLOOR:
            found[f"{method}: over the floor"] = one["total"] / floor
    for peer in ("transformers", "Lightning"):
        ours, theirs = (medians.get(f"{name}, {DEPTHS[1]}") for name in ("unbroken", peer))
        if ours is not None and theirs is not None:
            found[f"ours over {peer}, at {DEPTHS[1]:,}"] = ours["total"] / theirs["total"]
    return found


def main() -> None:
    protocol = Protocol(__file__, __doc__, measure, METHODS, rounds=5, starts_processes=True)
    if protocol.quick:
        for name in TRAINERS:
            module_of(name)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        os.environ["BENCHMARK_PLACE"] = folder
        for method in protocol.given.methods:
            if method != FLOOR:
                do("prepare", Path(folder), method, protocol.quick)
        protocol.run(conclude)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in TASKS:
        task, place, method = sys.argv[1:]
        print("\n" + json.dumps(TASKS[task](Path(place), method, False)), flush=True)
        os._exit(0)  # nothing of the end counts, nor may it fail
    main()
