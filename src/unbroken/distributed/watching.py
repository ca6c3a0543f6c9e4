"""Noticing at once that a rank on this machine has ended, however it ended."""

from __future__ import annotations

import os
import select
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from unbroken.store import Json, this_machine


def this_process() -> Json:
    """Return what another process needs to know to watch this one."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = None
    return [*this_machine(), space, os.getpid()]


class Watch:
    """Watches the ranks that run on this machine; others are never seen to end.

    The kernel says that a process has ended as soon as it has, before its parent knows; a
    process that is only stopped has not. (Linux, pidfd_open(2); elsewhere nobody is watched.)

    Args:
        processes: `this_process` of every rank, by rank; None: nobody is watched.

    Example:
        >>> Watch([this_process()]).ended([0])
        ()
    """

    def __init__(self, processes: Sequence[Any] = ()) -> None:
        here: Any = this_process()
        self._ends: dict[int, int] = {}
        for rank, (*place, pid) in enumerate(processes):
            if place == here[:-1] and hasattr(os, "pidfd_open"):
                with suppress(OSError):  # it has just ended: the timeout will tell
                    self._ends[rank] = os.pidfd_open(pid)

    def ended(self, ranks: Collection[int]) -> tuple[int, ...]:
        """Return those of the ranks whose process has ended."""
        watched = {self._ends[rank]: rank for rank in ranks if rank in self._ends}
        poll = select.poll()
        for end in watched:
            poll.register(end, select.POLLIN)
        return tuple(sorted(watched[end] for end, _ in poll.poll(0)))

    def copy(self) -> Watch:
        """Return one that watches the same ranks, and is closed by itself."""
        other = Watch()
        other._ends = {rank: os.dup(end) for rank, end in self._ends.items()}
        return other

    def close(self) -> None:
        """Watch nobody any longer."""
        for end in self._ends.values():
            os.close(end)
        self._ends.clear()
