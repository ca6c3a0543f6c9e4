"""Killing a run at a planned moment, and finding out where the kill has hit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from unbroken.cli.demo.child import Child, Watch
from unbroken.cli.demo.recipe import Moment

_POLL_SECONDS = 0.0005
_SAVE_SECONDS = 0.02  # about what a save of the demo takes; a wrong guess only costs tries


@dataclass(frozen=True)
class Pace:
    """How fast the machine is, measured on the run that is not killed.

    Attributes:
        start: Seconds from the beginning of a process to the beginning of training.
        step: Seconds of a step.
    """

    start: float
    step: float


@dataclass(frozen=True)
class Hit:
    """Where a kill has hit, as the run directory shows it.

    Attributes:
        phase: In words.
        seconds: How long the process had lived.
        staged: The half-written checkpoints that it left.
    """

    phase: str
    seconds: float
    staged: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """What a start has found.

    Attributes:
        record: Its record in the history of the run.
        staged: The half-written checkpoints that are still there after it.
    """

    record: dict[str, Any]
    staged: tuple[str, ...]


def await_start(child: Child, watch: Watch, starts: int) -> Start | None:
    """Wait until a process has chosen where to begin; None if it was over before.

    Args:
        child: The process.
        watch: Its run directory.
        starts: How many starts the run had before this one.
    """
    if not child.wait_until(lambda: len(watch.starts()) > starts):
        return None
    return Start(watch.starts()[-1], tuple(watch.staged()))


def kill_in_start(moment: Moment, child: Child, watch: Watch, pace: Pace) -> Hit | None:
    """Kill a process that has just begun; None if it came to its end before."""
    starts = len(watch.starts())
    is_time = child.wait_until(lambda: child.seconds >= moment.fraction * pace.start)
    return _kill(child, watch, starts) if is_time else None


def kill_in_training(moment: Moment, child: Child, watch: Watch, pace: Pace) -> Hit | None:
    """Kill a process that trains, as the moment says; None if it came to its end before."""
    starts = len(watch.starts()) - 1  # this one does not count: it has begun already
    if not child.wait_until(lambda: watch.step() >= moment.step):
        return None
    if moment.kind == "saving":
        is_time = _freeze_in_a_save(child, watch, moment.fraction * _SAVE_SECONDS)
    else:
        time.sleep(moment.fraction * pace.step)
        is_time = child.is_alive
    return _kill(child, watch, starts) if is_time else None


def _freeze_in_a_save(child: Child, watch: Watch, delay: float) -> bool:
    """Stop the process inside a save; if the commit won the race, try at the next save."""
    while child.wait_until(lambda: bool(watch.staged()), pause=_POLL_SECONDS):
        time.sleep(delay)
        child.freeze()
        if watch.staged():
            return child.is_alive
        child.unfreeze()
        delay /= 2
    return False


def _kill(child: Child, watch: Watch, starts: int) -> Hit:
    seconds = child.seconds
    child.kill()
    return Hit(_phase(watch, starts), seconds, tuple(watch.staged()))


def _phase(watch: Watch, starts: int) -> str:
    if len(watch.starts()) == starts:
        return "while starting"
    staged = watch.staged()
    if staged:
        return f"inside the save of {staged[-1].rpartition('.')[0]}"
    return f"while training, after step {watch.step()}"
