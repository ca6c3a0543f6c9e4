"""The saves of one run that go on beside its training, one after the other."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from torch.optim import Optimizer

from unbroken.checkpoint.background import BackgroundSave, SaveCost
from unbroken.checkpoint.shares import Share
from unbroken.checkpoint.snapshot import Staging, flattened, steady_tensors
from unbroken.errors import ConfigError
from unbroken.store import CheckpointWriter, Manifest

SnapshotMode = Literal["stream", "sync", "overlap"]
"""How a save gets hold of the state: see `Checkpointer`."""


Commit = Callable[[CheckpointWriter, Callable[[], None]], Manifest]
Store = Callable[[Callable[[Sequence[int]], Share], Callable[[CheckpointWriter], Manifest]], object]
"""Stores what its first argument returns, and commits with the second."""


class BesideTraining:
    """Starts saves, and hears how they ended.

    Args:
        mode: "sync" or "overlap"; with "stream" nothing is ever started here.

    Attributes:
        mode: As given.
        again: A save was given up, since tensors were changed while they were copied.
        cost: What the last save took that is over; None: there was none.

    Raises:
        ConfigError: There is no such mode.
    """

    def __init__(self, mode: SnapshotMode) -> None:
        if mode not in get_args(SnapshotMode):
            raise ConfigError("snapshot", expected=get_args(SnapshotMode), found=repr(mode))
        self.mode = mode
        self.again = False
        self.cost: SaveCost | None = None
        self._staging = Staging()
        self._running: BackgroundSave | None = None
        self._blocked = 0.0
        self._restless: set[str] = set()  # paths of tensors that do change between steps
        self._committed: list[int] = []

    def start(
        self,
        step: int,
        objects: Mapping[str, object],
        share: Share,
        store: Store,
        commit: Commit,
        began: float,
    ) -> None:
        """Take hold of what is saved, and let a thread store it.

        Args:
            step: Completed optimizer steps.
            objects: What is saved.
            share: What is saved of it.
            store: Stores that.
            commit: Commits, after it called what it is given.
            began: `time.perf_counter` when the save began.
        """
        optimizers: list[Optimizer] = []
        steady = None
        if self.mode == "overlap":
            optimizers = [one for one in flattened(objects) if isinstance(one, Optimizer)]
            steady = steady_tensors(objects, share.leaves, self._restless)
        snapshot = self._staging.take(share.leaves, steady)
        if self._running is None:
            atexit.register(self.wait)

        def write(gate: Callable[[], None]) -> None:
            held = replace(share, leaves=snapshot.leaves())
            store(lambda _: held, lambda writer: commit(writer, gate))

        self._running = BackgroundSave(step, snapshot, write, optimizers)
        if self.mode == "sync":
            self._running.approve()
        self.again = False
        self._blocked = time.perf_counter() - began

    def poll(self) -> None:
        """Hear whether the running save ended; called where no tensor is being changed.

        Raises:
            SaveError: It failed; earlier checkpoints are as they were.
        """
        if self._running is not None:
            if self._running.has_copied:  # else this would wait for it
                self._running.approve()
            if self._running.is_over or self._running.edited:
                self.settle()

    def settle(self) -> None:
        """Wait until no save is running; one that was given up is to be made again.

        Raises:
            SaveError: It failed; earlier checkpoints are as they were.
        """
        running, self._running = self._running, None
        if running is None:
            return
        atexit.unregister(self.wait)
        running.finish()
        self.cost = SaveCost(self._blocked, self._blocked + running.seconds, running.computing)
        if running.edited:
            self._restless.update(running.edited)
            self.again = True
        else:
            self._committed.append(running.step)

    def wait(self) -> None:
        """Wait until all that was saved is durable.

        Raises:
            SaveError: It failed, or tensors were changed while they were copied.
        """
        running = self._running
        self.settle()
        if running is not None and running.edited:
            raise running.edited_error()

    def committed(self) -> list[int]:
        """Return the steps whose checkpoints became durable since the last call."""
        found, self._committed = self._committed, []
        return found

    def note_streamed(self, step: int, began: float) -> None:
        """Count a save that was made while training stood still."""
        seconds = time.perf_counter() - began
        self.cost = SaveCost(seconds, seconds)
        self.again = False
        self._committed.append(step)

    def close(self) -> None:
        """Wait as `wait` does, and give the memory back."""
        try:
            self.wait()
        finally:
            self._staging = Staging()
