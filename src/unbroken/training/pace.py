"""How long steps and saves take: what is needed to stop in time."""

from __future__ import annotations

from collections.abc import Callable


class Pace:
    """Remembers the slowest step and the slowest save of this process.

    Args:
        clock: Monotonic seconds.

    Example:
        >>> now = [0.0]
        >>> pace = Pace(lambda: now[0])
        >>> now[0] = 2.0
        >>> pace.step_is_over()
        >>> pace.save_took(0.5)
        >>> pace.seconds_to_stop()
        3.0
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slowest_step = self._slowest_save = 0.0
        self._began = clock()

    def step_begins(self) -> None:
        """Take the time from here."""
        self._began = self._clock()

    def step_is_over(self) -> None:
        """Count what came since the last step: reading, training, evaluating, saving."""
        now = self._clock()
        self._slowest_step = max(self._slowest_step, now - self._began)
        self._began = now

    def save_took(self, seconds: float) -> None:
        """Count a save."""
        self._slowest_save = max(self._slowest_save, seconds)

    def seconds_to_stop(self) -> float:
        """Return how long before a deadline to stop: one more step, and a save twice as slow."""
        return self._slowest_step + 2 * self._slowest_save
