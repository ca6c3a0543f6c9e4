"""What saving costs: GPT-2 124M with AdamW, 1.49 GB, ours beside peers in the same run.

    python benchmarks/save.py [--rounds 5]

The protocol: each method has a process of its own, and in each round every method is measured
once; who goes first rotates. In a process the second and third save count: the first fills
buffers. *blocked*: the caller waits for the call. *durable*: until the bytes are synced; methods
that leave them to the page cache are synced afterwards. *lost*: a window of STEPS training steps
with one save after the first, against the mean of windows without one, before and after. *bare*:
a direct write and fsync of as many bytes, in the same process just before. Retention is not in
it: ours keeps all checkpoints here (where it removes some, it reads back the newer ones first).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from machine import measured_in_a_fresh_process, median, write

STEPS = 4
METHODS = (
    "unbroken stream",
    "unbroken sync",
    "unbroken overlap",
    "torch.save",
    "safetensors",
    "dcp.save",
    "dcp.async_save",
    "transformers",
)


class Unbroken:
    def __init__(self, model, optimizer, folder: Path, snapshot: str) -> None:
        from unbroken import Checkpointer

        objects = {"model": model, "optimizer": optimizer}
        self._checkpointer = Checkpointer(folder, snapshot=snapshot, **objects)
        self._checkpointer.resume()

    def save(self, number: int) -> None:
        self._checkpointer.save(number)

    def edge(self) -> None:
        self._checkpointer.is_due(1)

    def finish(self) -> None:
        self._checkpointer.wait()


class Blocking:
    """A method that is done when it returns, but for the sync."""

    def __init__(self, save, folder: Path) -> None:
        self._save, self._folder = save, folder
        folder.mkdir()

    def save(self, number: int) -> None:
        self._save(self._folder / f"save-{number % 2}")

    def edge(self) -> None:
        pass

    def finish(self) -> None:
        from gpt2_state import sync

        sync(self._folder)


class Asynchronous(Blocking):
    def save(self, number: int) -> None:
        self.finish()
        self._future = self._save(self._folder / f"save-{number % 2}")

    def finish(self) -> None:
        if getattr(self, "_future", None) is not None:
            self._future.result()
            super().finish()


def made(method: str, model, optimizer, folder: Path):
    import torch

    if method.startswith("unbroken"):
        return Unbroken(model, optimizer, folder, method.split()[1])
    state = lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()}  # noqa: E731
    if method == "torch.save":
        return Blocking(lambda path: torch.save(state(), path), folder)
    if method == "safetensors":
        return Blocking(lambda path: save_safetensors(model, optimizer, path), folder)
    if method == "transformers":
        return Blocking(transformers_save(model, optimizer), folder)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    dcp = torch.distributed.checkpoint
    if method == "dcp.save":
        return Blocking(lambda path: dcp.save(state(), checkpoint_id=str(path)), folder)
    return Asynchronous(lambda path: dcp.async_save(state(), checkpoint_id=str(path)), folder)


def save_safetensors(model, optimizer, path: Path) -> None:
    from safetensors.torch import save_file

    moments = optimizer.state_dict()["state"]
    flat = {f"{n}.{k}": t for n, one in moments.items() for k, t in one.items()}
    path.mkdir(exist_ok=True)
    save_file({n: p.detach() for n, p in model.named_parameters()}, path / "model.safetensors")
    save_file(flat, path / "optimizer.safetensors")


def transformers_save(model, optimizer):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, optimizers=(optimizer, None))
    trainer.create_scheduler(10, optimizer)

    def save(path: Path) -> None:
        trainer.save_model(str(path))
        trainer._save_optimizer_and_scheduler(str(path))
        trainer._save_rng_state(str(path))

    return save


def measure(method: str, layers: int) -> dict:
    from gpt2_state import (
        PeakMemory,
        bare_write,
        model_and_optimizer,
        nbytes_of,
        train_step,
    )

    model, optimizer = model_and_optimizer(layers)
    place = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
    try:
        with PeakMemory() as peak:
            saving = made(method, model, optimizer, place / "run")
            saving.save(1)
            saving.finish()
        bare = bare_write(place / "bare", nbytes_of(model, optimizer))
        began = time.perf_counter()
        saving.save(2)
        blocked = time.perf_counter() - began
        saving.finish()
        durable = time.perf_counter() - began
        lost, step = time_lost(lambda: train_step(model, optimizer), saving)
    finally:
        shutil.rmtree(place)
    found = {"blocked": blocked, "durable": durable, "bare": bare, "lost": lost, "step": step}
    return {**found, "durable_over_bare": durable / bare, "extra_memory": peak.nbytes}


def time_lost(step, saving) -> tuple[float, float]:
    def window(number: int | None) -> float:
        began = time.perf_counter()
        for position in range(STEPS):
            step()
            saving.edge()
            if position == 0 and number is not None:
                saving.save(number)
        return time.perf_counter() - began

    step()
    before = window(None)
    with_save = window(3)
    saving.finish()
    after = window(None)
    return with_save - (before + after) / 2, (before + after) / 2 / STEPS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--measure")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.layers)))
        raise SystemExit
    found: dict[str, list[dict]] = {method: [] for method in arguments.methods}
    for number in range(arguments.rounds):
        first = number % len(arguments.methods)
        for method in [*arguments.methods[first:], *arguments.methods[:first]]:
            more = ["--measure", method, "--layers", arguments.layers]
            found[method].append(measured_in_a_fresh_process(__file__, *more))
    medians = {
        method: {key: median([one[key] for one in all_]) for key in all_[0]}
        for method, all_ in found.items()
    }
    for method, one in medians.items():
        print(f"{method:17}", *(f"{key} {value:.3g}" for key, value in one.items()))
    write("save", {"rounds": arguments.rounds, "medians": medians, "all": found})
