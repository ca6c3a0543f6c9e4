"""The file into which a process writes what it saw: one JSON object a line, flushed each time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class Journal:
    """A recording on disk; a SIGKILL can tear its last line, no other.

    The file is made with the first line, so that a process that sees nothing leaves nothing; a
    forked child that sees something makes its own.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._file: TextIO | None = None
        self._pid = -1

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line and hand it to the kernel, which keeps it when this process dies."""
        if self._file is None or self._pid != os.getpid():
            self._open()
        if self._file is not None:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
            self._file.flush()

    def _open(self) -> None:
        self._pid = os.getpid()
        rank, world_size = place_in_the_group()
        path = self._folder / f"rank{rank}-pid{self._pid}.jsonl"
        self._file = path.open("a", encoding="utf-8")
        self.write(
            {
                "kind": "process",
                "rank": rank,
                "world_size": world_size,
                "pid": self._pid,
                "arguments": sys.argv,
                "torch": sys.modules["torch"].__version__,
            }
        )


def place_in_the_group() -> tuple[int, int]:
    """Return the rank and the number of ranks: of the process group, else of the environment."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
