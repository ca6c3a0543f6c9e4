"""Run work in a forked child that leaves no trace in this process: only lines of text come back.

The child shares no position in a file, no socket and no generator with this process, writes
nothing to the terminal, and ends at a deadline. With its own copy of everything it may open
files, draw numbers and fill caches.
"""

from __future__ import annotations

import fcntl
import gc
import os
import select
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

_DONE = "."
_HANDLED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


@dataclass(frozen=True)
class ChildOutput:
    """The whole lines that a child wrote in time, and why some may be missing (None: none are)."""

    lines: list[str]
    missing: str | None


class ForkedWork:
    """Work that runs in a forked child while this process goes on.

    That CUDA has begun here does no harm as long as the work leaves it alone, as the workers of a
    DataLoader do. A lock that another thread held at the fork stays locked in the child for ever.
    It then stands still, and ends at the deadline like one that is slow.

    Args:
        work: Called in the child as `work(write)`; `write(line)` sends one line back.
        seconds: How long the child may live.
    """

    def __init__(self, work: Callable[[Callable[[str], None]], None], *, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._child: int | None = None
        if sys.platform != "linux":
            return
        self._reader, writer = os.pipe()
        self._child = _forked()
        if self._child == 0:
            _work_as_child(work, writer, seconds)
        os.close(writer)
        if self._child is None:
            os.close(self._reader)

    def output(self) -> ChildOutput:
        """Wait for the child, end it, and return what it wrote. Call it once."""
        if self._child is None:
            return ChildOutput([], "there is no process of their own to read them in")
        try:
            lines = _lines_until(self._deadline, self._reader)
        finally:
            self._end()
        if lines[-1:] == [_DONE]:
            return ChildOutput(lines[:-1], None)
        is_late = time.monotonic() >= self._deadline
        return ChildOutput(
            lines, f"it took longer than {self._seconds:g} s" if is_late else "their reader died"
        )

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            os.close(self._reader)
            _end(child)

    def __del__(self) -> None:
        """Kill the child if its result was never read."""
        self._end()


def _forked() -> int | None:
    """Return the child's id, 0 in the child, None where no process can be made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads; see above
        try:
            return os.fork()
        except OSError:
            return None


def _lines_until(deadline: float, reader: int) -> list[str]:
    """Return all whole lines that arrive in time."""
    poll, text = select.poll(), b""
    poll.register(reader, select.POLLIN)
    while not text.endswith(f"{_DONE}\n".encode()):
        left = deadline - time.monotonic()
        if not poll.poll(max(0.0, left) * 1000):  # what came in time may be read late
            break
        part = os.read(reader, 65536)
        if not part:
            break
        text += part
    return text.decode().split("\n")[:-1]


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # another handler of this process has waited for it


def _work_as_child(
    work: Callable[[Callable[[str], None]], None], writer: int, seconds: float
) -> None:
    """Do the work and end the child; no exit handler of the parent runs."""
    try:
        _live_no_longer_than(seconds)
        gc.disable()  # nothing of the parent may be finished here: it could flush its files
        _let_go_of_files(keep=writer)
        torch.set_num_threads(1)  # the threads of the parent's pools are not here
        work(partial(_write, writer))
        _write(writer, _DONE)
    finally:
        os._exit(0)


def _write(writer: int, line: str) -> None:
    os.write(writer, f"{line}\n".encode())


def _live_no_longer_than(seconds: float) -> None:
    """End after so many seconds even if the parent died, and on signals that the parent handles."""
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _let_go_of_files(keep: int) -> None:
    """Give the child its own file positions, and nothing that it could write to."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        if descriptor in (keep, nowhere):
            continue
        if descriptor <= 2:
            os.dup2(nowhere, descriptor)
        else:
            _let_go(descriptor, nowhere)
    sys.stdout = sys.stderr = open(nowhere, "w")  # noqa: SIM115 (open until the end)


def _let_go(descriptor: int, nowhere: int) -> None:
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # the folder that was listed
        return
    if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
        os.dup2(nowhere, descriptor)
    elif stat.S_ISREG(mode):
        writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        if writes:
            os.dup2(nowhere, descriptor)
        else:
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
            os.lseek(own, os.lseek(descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(own, descriptor)
            os.close(own)
