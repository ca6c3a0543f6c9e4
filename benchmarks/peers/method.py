"""What all methods have in common, above all when a checkpoint counts as durable."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from disk import files_of


class Method:
    """Saves and loads; what a method leaves to the page cache is synced by a thread.

    So every checkpoint becomes durable, each as early as it can, and beside the training.

    Args:
        model: A model.
        optimizer: Its optimizer.
        folder: Where checkpoints go; made here.
    """

    def __init__(self, model, optimizer, folder: Path) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(1)
        self._durable: Future[None] = Future()

    def path(self, number: int) -> Path:
        return self.folder / f"save-{number}"

    def save(self, number: int) -> None:
        """Save; training may go on when this returns."""
        path = self.path(number)
        self._durable = self._thread.submit(make_durable, self.write(path), path)

    def write(self, path: Path) -> Callable[[], object] | None:
        """Write to a path; return what waits until that is done, if it is not."""
        raise NotImplementedError

    def before_update(self) -> None:
        """Called between the backward pass and the step of the optimizer."""

    def is_durable(self) -> bool:
        """Whether the last checkpoint would survive a power cut; called after each step."""
        if self._durable.done():
            self._durable.result()  # raises what it failed at
        return self._durable.done()

    def finish(self) -> None:
        """Wait until the last checkpoint is durable."""
        self._durable.result()

    def load(self, number: int) -> None:
        """Put a checkpoint into the model and the optimizer."""
        raise NotImplementedError

    def close(self) -> None:
        """End what goes on in the background."""
        self._thread.shutdown()

    def state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def make_durable(wait: Callable[[], object] | None, path: Path) -> None:
    if wait is not None:
        wait()
    for file in files_of(path):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
