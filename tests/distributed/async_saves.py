"""Saves that go on beside the training of several ranks, and what may come between."""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import torch

from distributed.sharded import build, train
from unbroken.capture import capture, encode
from unbroken.checkpoint import Checkpointer, SavePolicy
from unbroken.checkpoint.save import async_saver, staging
from unbroken.distributed import join
from unbroken.distributed.dtensors import local_part
from unbroken.errors import RankError, SaveError, UnbrokenError
from unbroken.store import CheckpointReader

EVERY, STEPS, MANY = 3, 20, 2000


class Run:
    """A hand-written loop on this rank."""

    def __init__(self, folder: str, layout: str, mode: str, **options) -> None:
        self.group = Calls(join(timeout=60.0))
        self.layout = layout
        self.model, self.optimizer = build(layout, seed=1)
        self.objects = {"model": self.model, "optimizer": self.optimizer}
        policy, options = SavePolicy(mode=mode), {"ranks": self.group, **options}
        options = {"save": policy, **options, **self.objects}
        self.checkpointer = Checkpointer(f"{folder}/run", **options)
        self.checkpointer.resume()
        self.folder, self.step = folder, 0

    def train_step(self) -> None:
        train(self.model, self.optimizer, self.layout, range(self.step, self.step + 1))
        self.step += 1

    def bytes_here(self) -> dict[str, tuple]:
        """Return what this rank holds, with its place in the whole."""
        return {
            leaf.path: (leaf.offsets, leaf.shape, b"".join(bytes(part) for part in leaf.chunks()))
            for leaf in encode(capture(self.objects)).leaves
            if leaf.nbytes
        }

    def save(self) -> dict[str, tuple]:
        """Save, and return what the checkpoint has to hold."""
        self.checkpointer.save(self.step)
        return self.bytes_here()

    def differing(self, step: int, wanted: dict[str, tuple]) -> list[str]:
        """Return the paths of which the checkpoint of a step holds other bytes than this rank."""
        reader = CheckpointReader(self.checkpointer.run.storage, f"checkpoint-{step}")
        return [
            path
            for path, (*place, data) in wanted.items()
            if _read(reader, path, *place, len(data)) != data
        ]

    def edit(self) -> None:
        """Change all that is saved in place, into what it was."""
        moments = (value for state in self.optimizer.state.values() for value in state.values())
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *moments):
                local_part(tensor).mul_(1)

    def fail_on(self, rank: int) -> None:
        if self.group.rank == rank:
            raise ValueError(f"rank {rank} has failed")

    def leave(self, found) -> None:
        Path(self.folder, f"found-{self.group.rank}.json").write_text(json.dumps(found))
        self.checkpointer.close()
        self.group.close()
        os._exit(0)


def _read(reader, path, offsets, shape, nbytes) -> bytes:
    buffer = bytearray(nbytes)
    start = (0,) * len(shape) if offsets is None else offsets
    reader.read_box_into(path, start, shape, memoryview(buffer))
    return bytes(buffer)


class Calls:
    """A group that notes its calls."""

    def __init__(self, group) -> None:
        self._group, self.made = group, []

    def __getattr__(self, name):
        self.made.append(name)
        return getattr(self._group, name)

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def world_size(self) -> int:
        return self._group.world_size


class Held:
    """Holds each copy beside the training back for a moment, or until it is let go."""

    def __init__(self, seconds: float | None) -> None:
        self.go, self.copies = threading.Event(), 0
        real = ctypes.memmove

        class Slow:
            @staticmethod
            def memmove(*where) -> None:
                if threading.current_thread() is not threading.main_thread():
                    self.copies += 1
                    self.go.wait(seconds)
                real(*where)

        staging.ctypes = Slow


def save_at_full_speed(folder: str, layout: str, mode: str) -> None:
    """Train and save without waiting; tell which bytes of which checkpoint are other ones."""
    held = Held(0.0005)
    run, wanted = Run(folder, layout, mode), {}
    while run.step < STEPS:
        run.train_step()
        if run.step % EVERY == 0:
            wanted[run.step] = run.save()
    run.checkpointer.wait()
    differing = {step: run.differing(step, data) for step, data in wanted.items()}
    run.leave({"differing": differing, "copies beside": held.copies})


def save_without_waiting_for_the_copy(folder: str, layout: str) -> None:
    """Train on while the copy is made, with nothing that holds the optimizer back."""
    held = Held(None)
    run = Run(folder, layout, "overlap")
    run.train_step()
    wanted = run.save()
    run.checkpointer._saver._hook.end()
    staging.StagedState.modified = lambda _self: ()
    staging.SourceDigests.differing = lambda *_: []
    run.train_step()
    held.go.set()
    run.checkpointer.wait()
    run.leave(run.differing(1, wanted))


def edit_on_one_rank(folder: str, layout: str) -> None:
    """Edit a tensor on rank 1 while it is copied; tell at which steps a save was due."""
    held, due = Held(None), []
    run = Run(folder, layout, "overlap", save_steps=MANY)
    run.train_step()
    run.save()
    if run.group.rank == 1:
        run.edit()
    held.go.set()
    while not due:
        run.train_step()
        if run.checkpointer.should_save(run.step):
            due.append(run.step)
    wanted = run.save()
    if run.group.rank == 1:
        run.edit()  # from now on it is copied at once
    run.checkpointer.wait()
    steps = [step for step, _ in run.checkpointer.run.catalog.folders()]
    run.leave({"due": due, "steps": steps, "differing": run.differing(due[0], wanted)})


def edit_on_one_rank_at_last(folder: str, layout: str) -> None:
    """Edit on rank 1, with no later save to make it good."""
    held, error = Held(None), None
    run = Run(folder, layout, "overlap")
    run.train_step()
    run.save()
    if run.group.rank == 1:
        run.edit()
    held.go.set()
    try:
        run.checkpointer.wait()
    except SaveError as caught:
        error = str(caught)
    run.leave(error)


def save_on_a_full_disk(folder: str, layout: str, mode: str) -> None:
    """On rank 1 no file may grow; tell at which step of the training which error was raised."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = Run(folder, layout, mode, save_steps=MANY)
    run.train_step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.group.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    run.save()
    error = None
    while error is None and run.step < MANY:
        run.train_step()
        try:
            run.checkpointer.should_save(run.step)
        except (SaveError, RankError) as caught:
            error = f"{type(caught).__name__}: {caught}"
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    failed_at, wanted = run.step, run.save()
    run.checkpointer.wait()
    steps = [step for step, _ in run.checkpointer.run.catalog.folders()]
    differing = run.differing(failed_at, wanted)
    run.leave({"at": failed_at, "error": error, "steps": steps, "differing": differing})


def ask_while_a_save_runs(folder: str, layout: str) -> None:
    """Ask at each step whether it is over; tell what that asked of the other rank, and when."""
    run = Run(folder, layout, "async", save_steps=MANY)
    run.train_step()
    run.checkpointer.should_save(run.step)  # after the first step all hear whether it can be saved
    run.save()
    run.group.made.clear()
    heard = []
    while not heard and run.step < MANY:
        run.train_step()
        run.checkpointer.should_save(run.step)
        heard = run.checkpointer.poll()
    run.leave({"calls": run.group.made, "at": run.step})


def fail_on_one_rank(folder: str, layout: str) -> None:
    """Rank 1 fails between two steps while a save runs; the others wait for it in theirs."""
    async_saver._PATIENCE = 0.5
    run, began = Run(folder, layout, "overlap"), time.monotonic()
    try:
        with run.checkpointer:
            run.train_step()
            run.save()
            run.fail_on(1)
            run.train_step()
    except (ValueError, RuntimeError, UnbrokenError) as error:
        told = {"error": str(error), "seconds": time.monotonic() - began}
        Path(folder, f"found-{run.group.rank}.json").write_text(json.dumps(told))
    os._exit(3)


def forget_to_close(folder: str, layout: str, mode: str) -> None:
    """Save, and end as a script does."""
    run = Run(folder, layout, mode)
    run.train_step()
    run.save()
    atexit._run_exitfuncs()
    os._exit(0)
