"""What saving costs a training on a CUDA device: a transformer of 1 B parameters with AdamW.

    python benchmarks/device.py [--quick] [--rounds 3]

*lost* is what a window of training with one save takes longer than as many steps just before it
and after it; *copy* how fast the state comes from the device into pinned memory, while nothing
else runs, and *bare* how fast one pinned copy of a gigabyte is. Steps are made as long as the
copy takes, at least, by more samples in each. Without a CUDA device only --quick runs.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn

from protocol import Protocol
from unbroken import Checkpointer
from unbroken.capture import capture, encode
from unbroken.checkpoint import SavePolicy
from unbroken.checkpoint.save.staging import StagingBuffer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, LAYERS, TOKENS = 2048, 20, 256
STEPS, WINDOWS = 6, 3


class Training:
    """Steps that take as long as it is wanted."""

    def __init__(self, quick: bool) -> None:
        width, layers = (64, 2) if quick else (WIDTH, LAYERS)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.objects = {"model": self.model, "optimizer": self.optimizer}
        self._shape, self._samples = (TOKENS, width), 1
        self.step()

    def step(self) -> None:
        inputs = torch.ones(self._samples, *self._shape, device=DEVICE)
        self.model(inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, steps: int) -> float:
        synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize()
        return time.perf_counter() - began

    def last_at_least(self, seconds: float) -> None:
        while self.seconds(1) < seconds:
            self._samples *= 2


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(_name: str, quick: bool) -> dict[str, float]:
    if DEVICE == "cpu" and not quick:
        raise SystemExit("device.py: needs a CUDA device; --quick runs without one")
    training = Training(quick)
    nbytes, copied = copy_of(training)
    if not quick:
        training.last_at_least(copied)
    place = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
    try:
        found = saved_beside(training, place / "run", 1 if quick else WINDOWS)
    finally:
        shutil.rmtree(place)
    bare = bare_bandwidth(1 << 20 if quick else 1 << 30)
    return {
        **found,
        "copy": nbytes / copied,
        "bare": bare,
        "copy_over_bare": nbytes / copied / bare,
    }


def copy_of(training: Training) -> tuple[int, float]:
    """Return the bytes of a snapshot, and the seconds of the second one: the first makes memory."""
    staging = StagingBuffer()
    for _ in range(2):
        leaves = encode(capture(training.objects)).leaves
        synchronize()
        began = time.perf_counter()
        staging.take(leaves)
        seconds = time.perf_counter() - began
    return sum(leaf.nbytes for leaf in leaves), seconds


def bare_bandwidth(nbytes: int) -> float:
    source = torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty(nbytes, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
    times = []
    for _ in range(5):
        synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize()
        times.append(time.perf_counter() - began)
    return nbytes / min(times)


def saved_beside(training: Training, folder: Path, windows: int) -> dict[str, float]:
    lost, blocked, steps = [], [], []
    with Checkpointer(folder, save=SavePolicy(mode="overlap"), **training.objects) as checkpointer:
        checkpointer.resume()
        checkpointer.save(0)
        checkpointer.wait()
        for number in range(1, windows + 1):
            before = training.seconds(STEPS)
            synchronize()
            began = time.perf_counter()
            checkpointer.save(number)
            blocked.append(time.perf_counter() - began)
            training.seconds(STEPS)
            done = STEPS
            while not checkpointer.poll():
                training.seconds(1)
                done += 1
            window = time.perf_counter() - began
            after = training.seconds(STEPS)
            steps.append((before + after) / (2 * STEPS))
            lost.append(window - done * steps[-1])
    return {"step": median(steps), "lost": median(lost), "blocked": median(blocked)}


def conclude(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    (found,) = medians.values()
    return {
        "lost over a step": found["lost"] / found["step"],
        "copy over bare": found["copy"] / found["bare"],
    }


if __name__ == "__main__":
    Protocol(__file__, __doc__, measure, ["unbroken overlap"], rounds=3).run(conclude)
