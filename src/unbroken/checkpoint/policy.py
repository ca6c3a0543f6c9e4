"""When something is due: every so many steps, every so many minutes, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unbroken.errors import ConfigError

Clock = Callable[[], float]
"""Seconds on a monotonic clock, as `time.monotonic` returns them."""


@dataclass(frozen=True)
class Cadence:
    """How often something happens; with both fields set, whichever comes first.

    Args:
        steps: Every so many optimizer steps, counted from step 0; None: not by steps.
        minutes: Every so many minutes of wall-clock time, counted from the last time it
            happened in this process; None: not by time.

    Raises:
        ConfigError: If a field is zero or negative.

    Example:
        >>> Cadence(steps=500).is_due(step=1000, seconds_since_last=3.0)
        True
        >>> Cadence(minutes=10).is_due(step=1000, seconds_since_last=599.0)
        False
        >>> Cadence().is_due(step=1000, seconds_since_last=1e9)
        False
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps <= 0:
            raise ConfigError("steps", "must be positive", found=self.steps)
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError("minutes", "must be positive", found=self.minutes)

    def is_due(self, step: int, seconds_since_last: float) -> bool:
        """Return whether it is due after `step` completed steps."""
        if self.steps is not None and step % self.steps == 0:
            return True
        return self.minutes is not None and seconds_since_last >= self.minutes * 60


class Timer:
    """Follows one cadence through a run: `due(step)` asks, `done()` restarts the minutes.

    Args:
        cadence: How often.
        clock: Seconds on a monotonic clock.

    Example:
        >>> now = [0.0]
        >>> timer = Timer(Cadence(minutes=1), clock=lambda: now[0])
        >>> now[0] = 61.0
        >>> timer.due(step=3)
        True
        >>> timer.done()
        >>> timer.due(step=4)
        False
    """

    def __init__(self, cadence: Cadence, clock: Clock) -> None:
        self._cadence = cadence
        self._clock = clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Return whether it is due after `step` completed steps."""
        return self._cadence.is_due(step, self._clock() - self._last)

    def done(self) -> None:
        """Count the minutes from now on."""
        self._last = self._clock()
