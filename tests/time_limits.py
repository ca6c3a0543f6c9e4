"""A limit for each test, so that none stands still."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def limited(seconds: float, name: str):
    """Raise pytest's failure after so many seconds, and kill what was started meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.clock_gettime(time.CLOCK_BOOTTIME)

    def give_up(number, frame):
        for process in descendants_since(began):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        traceback.print_stack(frame)
        # a traceback from within a signal's handler may have no line numbers, and pytest can't
        # show such a one: its worker would end
        pytest.fail(f"{name} took more than {seconds} s", pytrace=False)

    before = signal.signal(signal.SIGALRM, give_up)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


def descendants_since(began: float) -> list[int]:
    """Return the processes that come from this one and began after that second since the boot."""
    parents, beginnings = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            process = int(path.parent.name)
            parents[process] = int(fields[1])
            beginnings[process] = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    found = [os.getpid()]
    for one in found:  # it grows
        found += [process for process, parent in parents.items() if parent == one]
    return [process for process in found[1:] if beginnings[process] > began - 0.01]
