"""Remembering which checkpoints this process has read whole, so that it reads each once."""

from __future__ import annotations

from unbroken.errors import CheckpointError
from unbroken.storage import Stat
from unbroken.store.reader import CheckpointReader


class VerifiedCache:
    """Knows the checkpoints that were intact when this process read every byte of them.

    One that was touched since (the size, time or identity of any file) is read again.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointWriter, CheckpointReader
        >>> storage = MemoryStorage()
        >>> manifest = CheckpointWriter(storage, step=5, run_id="a" * 32).commit({})
        >>> VerifiedCache().problem_of(CheckpointReader(storage, "checkpoint-5")) is None
        True
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Stat | None, ...]] = {}

    def problem_of(self, reader: CheckpointReader) -> str | None:
        """Return what is wrong with a checkpoint, or None if it is intact."""
        look = reader.look()
        if self._seen.get(reader.folder) == look:
            return None
        try:
            reader.check_rest()
        except CheckpointError as error:
            self._seen.pop(reader.folder, None)
            return str(error)
        self._seen[reader.folder] = look
        return None
