"""The plan that the recorder follows in one launch of the script, and the file that it writes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO

Digests = Literal["auto", "full", "sampled"]


@dataclass(frozen=True)
class RecordPlan:
    """What to record, and when to kill the process.

    A step is one call of `optimizer.step()` by the outermost optimizer.

    Attributes:
        folder: Where each process writes its recording.
        digests: Every byte ("full"), blocks of large tensors ("sampled"), or by the size of
            the model ("auto").
        kill_after: The step of the run after which the process and its launchers are killed.
        stop_after: The step of the run after which the process ends with status 0.
        states: Which step a state is after, by the keys of `state_keys`: from it a resumed
            process knows which step of the run its first one is.
        parent: The process that launched the script; it and what is above are never killed.
    """

    folder: str
    digests: Digests = "auto"
    kill_after: int | None = None
    stop_after: int | None = None
    states: Mapping[str, int] = field(default_factory=dict)
    parent: int = 0

    def write(self, path: Path) -> None:
        """Write the plan for `read`."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> RecordPlan:
        """Return the plan that stands in a file."""
        return cls(**json.loads(Path(path).read_text()))


def state_keys(params: str, moments: str, counts: str) -> tuple[str, str]:
    """Return the names of a state: by all its parts, and by its parameters alone.

    Example:
        >>> state_keys("a", "b", "c")
        ('a/b/c', 'a')
    """
    return f"{params}/{moments}/{counts}", params


# The file into which a process writes what it saw: one JSON object a line, flushed each time.


class RecordingFile:
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


# Ending the script at a chosen step: as a kill does, or quietly.


def kill_now(parent: int) -> None:
    """SIGKILL this process; before it the launchers above it, so that none can react.

    Launchers (torchrun, a shell) are the processes between `parent`, which is spared, and this
    one. The other ranks kill themselves at the same step.
    """
    for pid in reversed(_ancestors_below(parent)):
        os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def stop_now() -> NoReturn:
    """End this process with status 0; nothing that follows in the script is run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _ancestors_below(parent: int) -> list[int]:
    """Return the processes above this one, up to `parent`; none if it is not among them."""
    chain: list[int] = []
    pid = os.getppid()
    while pid not in (0, 1, parent):
        chain.append(pid)
        pid = _parent_of(pid)
    return chain if pid == parent else []


def _parent_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # gone, or a system without /proc
        return 0
    return int(status.rpartition(")")[2].split()[1])  # the name in parentheses may hold blanks
