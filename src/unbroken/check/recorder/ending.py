"""Ending the script at a chosen step: as a kill does, or quietly."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn


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
