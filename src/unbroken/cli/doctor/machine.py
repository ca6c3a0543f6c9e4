"""Room, load and clock of the machine: what makes a training slow, or end for no good reason."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from unbroken.cli.doctor.finding import Finding
from unbroken.cli.tables import date_text, size_text

_SHARED_MEMORY = "/dev/shm"  # noqa: S108  # its size alone is looked at
_LITTLE_SHARED_MEMORY = 1_000_000_000
_BUSY = 1.5  # runnable processes for each core
_EARLIEST, _LATEST = 1_735_689_600.0, 4_102_444_800.0  # 2025, 2100


@dataclass(frozen=True)
class Machine:
    """What is looked at.

    Attributes:
        cores: How many this process may use.
        load: Processes that ran or waited, on average over the last minute; None: unknown.
        shared_memory: The size of /dev/shm in bytes; None: there is none.
        clock: Seconds since 1970.
    """

    cores: int
    load: float | None
    shared_memory: int | None
    clock: float

    @classmethod
    def here(cls, cores: int) -> Machine:
        """Look at this machine."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return cls(cores, load, _size_of(_SHARED_MEMORY), time.time())

    def check(self) -> list[Finding]:
        """Return what is wrong."""
        return [*self._check_shared_memory(), *self._check_load(), *self._check_clock()]

    def _check_shared_memory(self) -> Iterator[Finding]:
        if self.shared_memory is None or self.shared_memory >= _LITTLE_SHARED_MEMORY:
            return
        yield Finding(
            "risk",
            f"{_SHARED_MEMORY} has only {size_text(self.shared_memory)}",
            "workers of a DataLoader hand batches over there; when it is full, they die with "
            '"bus error"',
            "start the container with --shm-size=8g, or use dataloader_num_workers=0",
        )

    def _check_load(self) -> Iterator[Finding]:
        if self.load is None or self.load <= _BUSY * self.cores:
            return
        yield Finding(
            "note",
            f"the machine is busy: load {self.load:.1f} on {self.cores} cores",
            "training will be slow; the bits are not affected",
            "wait, or stop what else is running",
        )

    def _check_clock(self) -> Iterator[Finding]:
        if _EARLIEST <= self.clock <= _LATEST:
            return
        day = date_text(time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.clock)))
        yield Finding(
            "risk",
            f"the clock says {day}",
            "the end of a Slurm job is known by the clock, and checkpoints carry its dates. "
            "(Nothing in unbroken decides by date which checkpoint is newer.)",
            "set the clock",
        )


def _size_of(folder: str) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize
