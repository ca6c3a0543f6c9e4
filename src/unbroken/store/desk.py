"""What one thread reads a checkpoint with."""

from __future__ import annotations

from typing import Self

from unbroken.storage import ReadHandle
from unbroken.store.checkpoint_folder import CheckpointFolder


class Desk:
    """Open files, and memory for bytes that nobody keeps.

    Args:
        at: The folder of the checkpoint.
    """

    def __init__(self, at: CheckpointFolder) -> None:
        self._at = at
        self._handles: dict[str, ReadHandle] = {}
        self._scratch = memoryview(b"")

    def handle(self, name: str) -> ReadHandle:
        """Return a file of the checkpoint, opened once."""
        if name not in self._handles:
            self._handles[name] = self._at.open(name)
        return self._handles[name]

    def scratch(self, nbytes: int) -> memoryview:
        """Return memory that is used again with the next call."""
        if len(self._scratch) < nbytes:
            self._scratch = memoryview(bytearray(nbytes))
        return self._scratch[:nbytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()
