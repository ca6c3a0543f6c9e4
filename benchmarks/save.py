"""What saving costs: GPT-2 124M with AdamW, 1.49 GB, ours beside peers in the same run.

    python benchmarks/save.py [--quick] [--rounds 3] [--methods METHOD ...]

In a process the first save is not counted: it fills buffers. Then, in turns with direct writes of
as many bytes (*bare*), a few saves with nothing else running: *blocked* is how long the call
takes, *durable* how long until the bytes are synced. Then windows of training with one save, in
turns with windows without: *lost* is what a window takes longer than as many steps just before it
and after it. A window goes on until the checkpoint is durable, and for STEPS steps at least. What
a method leaves to the page cache is synced by a thread as soon as it is written, so that all
checkpoints become equally durable; where a method must not be disturbed while it copies, the
update waits, and the wait is in *lost*. Training uses all cores, so that what goes on in the
background has to share them. Nothing is removed meanwhile: each save is a new folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import peers
from disk import bare_write
from protocol import Protocol

STEPS = 4  # of a window, at least
ALONE, WINDOWS = 2, 2


def measure(name: str, quick: bool) -> dict[str, float]:
    from gpt2_state import PeakMemory, model_and_optimizer, nbytes_of, train_step

    model, optimizer = model_and_optimizer(quick=quick)
    place = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
    try:
        with PeakMemory() as peak:
            method = peers.make(name, model, optimizer, place / "run")
            method.save(1)
            method.finish()
        alone = saved_alone(method, place / "bare", nbytes_of(model, optimizer))
        step = lambda: train_step(model, optimizer, method.before_update)  # noqa: E731
        beside = saved_beside(method, step, 1 if quick else WINDOWS)
        method.close()
    finally:
        shutil.rmtree(place)
    return {**alone, **beside, "extra_memory": peak.nbytes}


def saved_alone(method, bare_file: Path, nbytes: int) -> dict[str, float]:
    bare, blocked, durable = [], [], []
    for number in range(2, 2 + ALONE):
        bare.append(bare_write(bare_file, nbytes))
        began = time.perf_counter()
        method.save(number)
        blocked.append(time.perf_counter() - began)
        method.finish()
        durable.append(time.perf_counter() - began)
    ratio = median(one / beside for one, beside in zip(durable, bare, strict=True))
    return {
        "bare": median(bare),
        "blocked": median(blocked),
        "durable": median(durable),
        "durable_over_bare": ratio,
    }


def saved_beside(method, step, windows: int) -> dict[str, float]:
    """Train, with a save now and then; return what it costs."""
    step()
    before = [seconds_of(step) for _ in range(STEPS)]
    usual, lost, blocked, until_durable = [], [], [], []
    for number in range(10, 10 + windows):
        seconds, steps, waited = window(method, step, number)
        after = [seconds_of(step) for _ in range(steps)]
        usual.append(mean(before + after))
        lost.append(seconds - steps * usual[-1])
        blocked.append(waited)
        until_durable.append(steps)
        before = after
    return {
        "step": median(usual),
        "blocked_in_training": median(blocked),
        "lost": median(lost),
        "steps_until_durable": median(until_durable),
    }


def window(method, step, number: int) -> tuple[float, int, float]:
    """Save, and train until that is durable; return the seconds, the steps, the caller's wait."""
    began = time.perf_counter()
    method.save(number)
    waited = time.perf_counter() - began
    steps, durable = 0, False
    while steps < STEPS or not durable:
        step()
        durable = method.is_durable()
        steps += 1
    return time.perf_counter() - began, steps, waited


def seconds_of(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def conclude(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the ratios that are held to a bound."""
    ours, blocking = medians.get("unbroken overlap"), medians.get("unbroken blocking")
    found: dict[str, float] = {}
    dcp = [one["lost"] for name, one in medians.items() if name.startswith("dcp.async_save")]
    beside = {"transformers": medians.get("transformers", {}).get("lost")}
    beside["the best dcp.async_save"] = min(dcp, default=None)
    beside["torch_checkpointing"] = medians.get("torch_checkpointing async", {}).get("lost")
    if ours is not None:
        found["blocked over a step"] = ours["blocked_in_training"] / ours["step"]
        for name, lost in beside.items():
            if lost is not None:
                found[f"lost over that of {name}"] = ours["lost"] / lost
    if blocking is not None:
        found["durable over bare"] = blocking["durable_over_bare"]
    return found


if __name__ == "__main__":
    protocol = Protocol(__file__, __doc__, measure, peers.SAVING, rounds=3)
    if protocol.quick:
        import peers.dcp
        import peers.hosts
    protocol.run(conclude)
