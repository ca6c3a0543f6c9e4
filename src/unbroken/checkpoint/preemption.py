"""Stopping in time: signals and deadlines become one question, asked at each step edge.

A signal handler only takes a note; the state of the run is saved by the training loop at the
edge of the step, where it is whole. (Saving inside the handler can hit the middle of a
backward pass: Lightning#21406.) Before the first step there is nothing to save, and what a start
does until then (verify, compare, read again) may take minutes: it ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType

from unbroken.data.worker_signals import hear_no_more_of_workers
from unbroken.distributed import Group
from unbroken.errors import ConfigError

EXIT_STOPPED = 75
"""Exit status of a run that was asked to stop, saved, and wants to be started again.

It is `EX_TEMPFAIL` of BSD's sysexits.h: "the user is invited to retry".
"""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class TrainingStopped(SystemExit):
    """The run was asked to stop before its end; its state is saved.

    Uncaught, it ends the process with status `EXIT_STOPPED` (75) and no traceback.

    Attributes:
        step: Completed optimizer steps in the saved state; None: this start has made no step,
            and all checkpoints are as they were.
        reason: What asked for the stop, for example "SIGTERM".
    """

    def __init__(self, step: int | None, reason: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.step = step
        self.reason = reason

    def __str__(self) -> str:
        """Return the story in one line."""
        if self.step is None:
            return f"stopped by {self.reason} before the first step: run the same command again"
        return f"stopped by {self.reason} after step {self.step}; saved: run the same command again"


class Preemption:
    """Notes SIGTERM, SIGUSR1, Ctrl-C and deadlines; `reason()` says whether to stop now.

    As a context manager it puts the handlers in place and, on leaving, puts the old ones back.
    Until `training_begins`, a signal raises `TrainingStopped` at once; a second Ctrl-C raises
    KeyboardInterrupt at any time. Outside the main thread, where Python
    allows no handlers, only deadlines are watched.

    Args:
        max_seconds: Stop after so many seconds in this process; None: no limit.
        margin_seconds: How long before a deadline to stop, so that the last save fits.
        clock: Monotonic seconds.
        wall_clock: Seconds since the epoch, for `SLURM_JOB_END_TIME`.
        environment: The environment variables to read.

    Raises:
        ConfigError: If `SLURM_JOB_END_TIME` is set but is no number.

    Example:
        >>> now = [0.0]
        >>> with Preemption(max_seconds=60, clock=lambda: now[0], environment={}) as preemption:
        ...     before = preemption.reason()
        ...     now[0] = 61.0
        ...     after = preemption.reason()
        >>> before, after
        (None, 'max_time')
    """

    def __init__(
        self,
        *,
        max_seconds: float | None = None,
        margin_seconds: float = 0.0,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.margin_seconds = margin_seconds
        self._clock = clock
        self._deadlines: dict[str, float] = {}
        if max_seconds is not None:
            self._deadlines["max_time"] = clock() + max_seconds
        self._add_slurm_deadline(os.environ if environment is None else environment, wall_clock)
        self._received: str | None = None
        self._begins_in: int | None = None  # the process whose training has not begun
        self._is_ending = False
        self._interrupts = 0
        self._previous: dict[int, object] = {}

    def _add_slurm_deadline(
        self, environment: Mapping[str, str], wall_clock: Callable[[], float] | None
    ) -> None:
        end = environment.get("SLURM_JOB_END_TIME")
        if not end or wall_clock is None:
            return
        try:
            seconds_left = float(end) - wall_clock()
        except ValueError:
            raise ConfigError(
                "SLURM_JOB_END_TIME", expected="seconds since 1970", found=repr(end)
            ) from None
        self._deadlines["SLURM_JOB_END_TIME"] = self._clock() + seconds_left

    def reason(self) -> str | None:
        """Return what asks for a stop at this step edge, or None to go on."""
        if self._received is not None:
            return self._received
        now = self._clock() + self.margin_seconds
        return next((name for name, end in self._deadlines.items() if now >= end), None)

    def training_begins(self) -> None:
        """Let signals wait for the edge of a step from now on.

        Raises:
            TrainingStopped: One came before, and what it raised was swallowed (in a destructor).
        """
        if self._begins_in is not None:
            self._begins_in = None
            if self._received is not None:
                raise TrainingStopped(None, self._received)

    def __enter__(self) -> Preemption:
        self._begins_in = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: the old handler was not installed from Python and cannot be named again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        hear_no_more_of_workers()
        # Once: what is being closed by then is not interrupted. A worker that was just forked
        # leaves it to its parent.
        if self._begins_in == os.getpid() and not self._is_ending:
            self._is_ending = True
            raise TrainingStopped(None, self._received)


def agreed_reason(group: Group, reason: str | None) -> str | None:
    """Return why to stop, if any rank has a reason: the first rank's that has one."""
    if not group.any(reason is not None):
        return None
    reasons = group.gather("why to stop", reason)
    return next(str(one) for one in reasons if one is not None)
