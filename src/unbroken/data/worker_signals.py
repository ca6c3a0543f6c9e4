"""Start a loader's worker processes so that they ignore signals, and end them with their parent."""

from __future__ import annotations

import atexit
import inspect
import multiprocessing
import multiprocessing.util  # its call at exit must be registered before ours: the last goes first
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from multiprocessing import context, popen_spawn_posix, reduction, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

_PID_BYTES = 4
_LEFT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PATIENCE = 0.5  # seconds in which a worker that is told to end may finish what it reads


def leaving_signals(then: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """Return a `worker_init_fn` that lets workers live on when their process group is to stop.

    Slurm, systemd and a terminal signal every process of a job, some more than once. A worker
    that obeyed would take the batches away that the trainer needs to reach its next step edge,
    where it saves. So a worker ends when torch says so, and when the process that made it ends
    or is dead: Python, which at its exit sends workers SIGTERM and waits, would wait for ever.

    Args:
        then: A `worker_init_fn` to call besides.
    """
    _roll_of_this_process()
    _let_spawned_workers_begin()
    return partial(_leave_signals, tie=_Tie(), then=then)


def leave_signals_of(loader: Any) -> None:
    """Let the workers of a user's torch `DataLoader` leave signals to their parent."""
    loader = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return
    own = loader.worker_init_fn
    if not _leaves_signals(own):
        loader.worker_init_fn = leaving_signals(own)


def shut_down(batches: Iterator[Any]) -> None:
    """End the workers behind a torch `DataLoader`'s iterator now; do nothing to others.

    Torch does it when the iterator is collected. After an error in a worker the iterator stands
    in a reference cycle, and its end then takes 5 seconds for each worker (torch 2.13), as it
    does where workers are reading something that takes long: these are killed.

    Args:
        batches: What `iter(loader)` gave.

    Example:
        >>> shut_down(iter([1, 2]))
    """
    end_workers = getattr(batches, "_shutdown_workers", None)
    if end_workers is None or sys.is_finalizing():  # at the exit, the roll has ended them
        return
    if threading.current_thread() is not threading.main_thread():
        end_workers()
        return
    late = threading.Timer(_PATIENCE, _kill, [[*getattr(batches, "_workers", ())]])
    late.daemon = True
    with _ignore_sigchld():
        late.start()
        try:
            end_workers()
        finally:
            late.cancel()


def hear_no_more_of_workers() -> None:
    """From now on, a dead worker raises only where its batch is awaited.

    A signal to all processes of a job may kill a worker that has only been started by a fork
    server. torch would raise an error for it in the middle of a step, which is to be saved.
    """
    if signal_handling._SIGCHLD_handler_set:  # noqa: SLF001 (torch has no public name)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def is_end_of_a_worker(error: BaseException) -> bool:
    """Return whether an error is that of torch for a worker that died.

    Example:
        >>> is_end_of_a_worker(RuntimeError("no"))
        False
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _leave_signals(worker: int, *, tie: _Tie, then: Callable[[int], None] | None = None) -> None:
    signal.signal(signal.SIGTERM, _obey_torch)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _LEFT)
    tie.bind()
    if then is not None:
        then(worker)


def _obey_torch(number: int, frame: FrameType | None) -> None:
    """End a worker only if torch set its done event before: then the signal is torch's own."""
    while frame is not None and frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    done_event = None if frame is None else frame.f_locals.get("done_event")
    # Not told.is_set(): it takes a lock, which the interrupted code may hold.
    flag = getattr(done_event, "_flag", None)
    if flag is not None and flag.get_value():
        os._exit(0)


class _Roll:
    """The workers of this process that leave signals to it, and their tie to its life.

    It is a pipe. Each worker writes its process id into it, so that this process knows at its
    exit whom to end: other children may need longer, and are no concern of ours. Only this
    process has the end that reads, so that workers learn at once when it is gone.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self._read, self.write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self.write, False)
        self._entered: set[int] = set()
        atexit.register(self.end_workers)

    def read(self) -> None:
        """Read who has entered, before the pipe is full."""
        with suppress(BlockingIOError):
            while entered := os.read(self._read, 1024 * _PID_BYTES):
                self._entered.update(memoryview(entered).cast("i"))

    def end_workers(self) -> None:
        """End the workers that still live, at the exit of this process."""
        if self.process != os.getpid():  # a forked process inherits this call
            return
        self.read()
        workers = [one for one in multiprocessing.active_children() if one.pid in self._entered]
        with _ignore_sigchld():
            _kill(workers)
            for worker in workers:
                worker.join(_PATIENCE)

    def leave_to_parent(self) -> None:
        """Close the end that reads, in a process that has just been forked."""
        read, self._read = self._read, -1
        if read >= 0:
            os.close(read)


_roll: _Roll | None = None


def _roll_of_this_process() -> _Roll:
    global _roll
    if _roll is None or _roll.process != os.getpid():
        _roll = _Roll()
    return _roll


_masks: dict[int, set[int | signal.Signals]] = {}  # of the threads that are making a worker


def _before_fork() -> None:
    if _roll is None:
        return
    _roll_of_this_process().read()  # a process that was forked itself needs one of its own
    if _makes_a_worker(inspect.currentframe()):
        # Signals wait until the worker has said how it takes them; they would kill it before.
        _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT)


def _after_fork_in_parent() -> None:
    mask = _masks.pop(threading.get_ident(), None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    _masks.clear()
    if _roll is not None:
        _roll.leave_to_parent()


def _makes_a_worker(frame: FrameType | None) -> bool:
    """Return whether this fork becomes a worker that leaves signals to this process."""
    while frame is not None:
        if frame.f_code.co_name == "__init__":
            made = getattr(frame.f_locals.get("self"), "__dict__", {})
            init = made.get("_worker_init_fn")
            if isinstance(init, partial):
                return _leaves_signals(init)
        frame = frame.f_back
    return False


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


def _let_spawned_workers_begin() -> None:
    """Let signals wait for a worker that is spawned, too, until it says how it takes them.

    No hook of `os.register_at_fork` is called there. What is started inherits the mask of this
    thread, and imports torch for seconds before it comes to `_leave_signals`.
    """
    launch: Any = popen_spawn_posix.Popen._launch  # type: ignore[attr-defined]  # noqa: SLF001
    if hasattr(launch, "__wrapped__"):
        return

    @wraps(launch)
    def launched(popen: Any, process: Any) -> None:
        if not any(map(_leaves_signals, getattr(process, "_args", ()))):
            launch(popen, process)
            return
        resource_tracker.ensure_running()  # where it has to be started, it takes the mask away
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT)
        try:
            launch(popen, process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    popen_spawn_posix.Popen._launch = launched  # type: ignore[attr-defined]  # noqa: SLF001


def _leaves_signals(init: object) -> bool:
    return isinstance(init, partial) and init.func is _leave_signals


class _Tie:
    """What a worker needs to enter the roll of the process that makes it."""

    def __init__(self, write: Any = None) -> None:
        self._write: int | None = None if write is None else write.detach()

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the pipe along to a worker that is not forked, but spawned."""
        if context.get_spawning_popen() is None:
            return _Tie, ()
        roll = _roll_of_this_process()
        roll.read()
        return _Tie, (reduction.DupFd(roll.write),)

    def bind(self) -> None:
        """Let this process, a worker, end with the one that made it."""
        write = self._write
        if write is None and _roll is not None:
            write = _roll.write
        if write is None:
            return
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(write, os.getpid().to_bytes(_PID_BYTES, sys.byteorder))
        threading.Thread(target=_end_with, args=(write,), name="unbroken-tie", daemon=True).start()


def _end_with(write: int) -> None:
    """End this process when nobody reads the pipe any more.

    torch's own worker looks for its parent only between two batches, and never where it waits
    for room in a queue that nobody reads any more.
    """
    hangup = select.poll()
    hangup.register(write, 0)  # poll reports a hang-up without being asked
    hangup.poll()
    os._exit(0)


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


@contextmanager
def _ignore_sigchld() -> Iterator[None]:
    """Keep torch's handler from raising an error for a worker that is killed on purpose."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:  # else it was not set from Python, and cannot be named again
            signal.signal(signal.SIGCHLD, before)
