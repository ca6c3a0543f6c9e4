"""The interval between saves that loses least time, and what is lost then.

Failures come at random, on average every M seconds, whatever the run does meanwhile (a Poisson
process). With t seconds of training between saves, d seconds of training lost for each save, L
seconds more until a save is durable and R seconds to start again:

    goodput(t) = t / M * exp(-(L + R) / M) / (exp((t + d) / M) - 1)

Between two failures (M seconds on average, and M * (exp(R / M) - 1) more until a start is not
itself broken off) as many intervals are kept as became durable: on average
exp(-L / M) / (exp((t + d) / M) - 1). With L = 0 it is the complete expression of Daly (2006), "A
higher order estimate of the optimum checkpoint interval for restart dumps"; its maximum does not
depend on L and R, and is close to sqrt(2 d M), Young (1974), where d is small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unbroken.errors import ConfigError


def best_interval(lost: float, between_failures: float) -> float:
    """Return the seconds of training between saves that make goodput largest.

    It is the root of (1 - x) * exp(x + d / M) = 1 with x = t / M: exact, where Young's sqrt(2 d M)
    is a tenth off as soon as saves are slow.

    Args:
        lost: Seconds of training that one save costs; more than 0.
        between_failures: Mean seconds between failures; more than 0.

    Raises:
        ConfigError: One of them is not a positive number.

    Example:
        >>> round(best_interval(lost=10.0, between_failures=3 * 3600.0))  # Young: 465
        458
    """
    _check_positive("lost", lost)
    _check_positive("between_failures", between_failures)
    ratio = lost / between_failures
    low, high = 0.0, math.nextafter(1.0, 0.0)
    for _ in range(100):  # doubles are exhausted after some 60 halvings
        middle = (low + high) / 2
        if math.log1p(-middle) + middle + ratio > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2 * between_failures


@dataclass(frozen=True)
class Rhythm:
    """Training, saves and failures in their turn; the seconds of each.

    Args:
        interval: Training between two saves.
        lost: Training that one save costs: the caller waits, or is slowed down.
        until_durable: From then until the save survives a failure; 0 where saving blocks.
        restart: From a failure until training goes on.
        between_failures: Mean time from one failure to the next.

    Raises:
        ConfigError: A field is negative or no number; `interval` or `between_failures` is 0.

    Example:
        >>> rhythm = Rhythm(458, lost=10, until_durable=0, restart=300, between_failures=10800)
        >>> round(rhythm.goodput, 3)
        0.931
    """

    interval: float
    lost: float
    until_durable: float
    restart: float
    between_failures: float

    def __post_init__(self) -> None:
        _check_positive("interval", self.interval)
        _check_positive("between_failures", self.between_failures)
        for name in ("lost", "until_durable", "restart"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(name, expected="a number of seconds, at least 0", found=value)

    @property
    def goodput(self) -> float:
        """The part of wall-clock time that trains and is kept, between 0 and 1."""
        mean = self.between_failures
        whole = (self.interval + self.lost) / mean
        if whole > 700:  # the next power of e is beyond doubles: nothing is ever kept
            return 0.0
        late = math.exp(-(self.until_durable + self.restart) / mean)
        return self.interval / mean * late / math.expm1(whole)

    @property
    def saving(self) -> float:
        """The part of wall-clock time that kept saves cost."""
        return self.goodput * self.lost / self.interval

    @property
    def starting(self) -> float:
        """The part of wall-clock time from failures until training goes on."""
        return -math.expm1(-self.restart / self.between_failures)

    @property
    def repeated(self) -> float:
        """The part of wall-clock time whose work a failure takes."""
        return 1 - self.goodput - self.saving - self.starting


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(name, expected="a positive number of seconds", found=value)


# Durations as people read them.


def seconds_text(seconds: float) -> str:
    """Return a duration for people.

    Example:
        >>> seconds_text(0.5), seconds_text(58), seconds_text(421), seconds_text(11124)
        ('0.50 s', '58 s', '7.0 min', '3.1 h')
    """
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
