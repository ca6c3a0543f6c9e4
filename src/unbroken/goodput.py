"""How often to save, and what part of the time is useful training.

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from unbroken.errors import ConfigError
from unbroken.stored_names import to_stored

__all__ = [
    "DAY",
    "LEAST_LOST",
    "PUBLISHED_FAILURES",
    "FailureRate",
    "Failures",
    "Observed",
    "Rhythm",
    "SaveInterval",
    "UsualCost",
    "best_interval",
    "seconds_text",
]

# The interval between saves that loses least time, and what is lost then.


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


# How often others fail.


DAY = 24 * 3600.0


@dataclass(frozen=True)
class Failures:
    """How many interruptions were counted, on how many GPUs, in how many days.

    Example:
        >>> round(PUBLISHED_FAILURES.gpu_days)
        2112
    """

    count: int
    gpus: int
    days: float

    @property
    def gpu_days(self) -> float:
        """Mean days between failures of one GPU and its part of everything else."""
        return self.gpus * self.days / self.count


PUBLISHED_FAILURES = Failures(419, 16_384, 54)
"""Unexpected interruptions of Llama 3 405B's pre-training (arXiv 2407.21783, section 3.3.4)."""


LEAST_LOST = 1e-3  # seconds: a save that costs nothing would be made all the time


# How often a run fails: given by the user, read from its history, or assumed until then.


_LEAST_MEAN = 60.0  # seconds: a run that hardly ever lives for so long is not helped by saves


@dataclass(frozen=True)
class FailureRate:
    """The mean time between failures (MTBF), and how it is known.

    Attributes:
        seconds: From one failure to the next, on average.
        source: "given" by the user, "observed" in the history of the run, or "assumed".
        count: How many failures were observed.

    Example:
        >>> print(FailureRate(11124, "observed", 7))
        failures every 3.1 h (7 observed)
    """

    seconds: float
    source: Literal["given", "observed", "assumed"]
    count: int = 0

    def __str__(self) -> str:
        """Return it for people."""
        source = f"{self.count} observed" if self.source == "observed" else self.source
        return f"failures every {seconds_text(self.seconds)} ({source})"


@dataclass(frozen=True)
class Observed:
    """The seconds that a run trained, and its failures.

    Attributes:
        seconds: For which it ran, over all its starts.
        failures: How many of them ended without being asked to.
    """

    seconds: float = 0.0
    failures: int = 0

    @classmethod
    def of(cls, history: Iterable[Mapping[str, object]]) -> Observed:
        """Read it from the records of history.jsonl, the oldest first.

        A start is a failure of the one before if that did not give the run's lock back, or says
        itself that it failed. What a segment did after its last record is not seen, so the time
        is rather too short: by half an interval between saves for each failure, on average. Starts
        without a date, of earlier versions, are left out.

        Example:
            >>> Observed.of([
            ...     {"event": "started", "at": "2026-01-31T12:00:00+00:00"},
            ...     {"event": "saved", "at": "2026-01-31T13:00:00+00:00"},
            ...     {"event": "started", "at": "2026-01-31T14:00:00+00:00", "previous_owner": "a"},
            ... ])
            Observed(seconds=3600.0, failures=1)
        """
        seconds, failures = 0.0, 0
        began: float | None = None
        latest, failed = 0.0, False
        for record in history:
            at = _date_of(record)
            if record.get("event") == "started":
                if began is not None:
                    seconds += latest - began
                    failures += failed or record.get("previous_owner") is not None
                began, latest, failed = at, at or 0.0, False
            elif at is not None:
                latest = max(latest, at)
            failed = failed or record.get("event") == "failed"
        return cls(seconds if began is None else seconds + latest - began, failures)

    def rate(self, ranks: int, running: float) -> FailureRate:
        """Return how often the run fails.

        With no failure observed it is assumed: what was published of large clusters for so many
        GPUs, but once a day at least, since those figures hold no spot machines, no time limits
        and nobody who stops his own run.

        Args:
            ranks: How many GPUs, or processes, fail together.
            running: Seconds since the last start.

        Example:
            >>> print(Observed(7200, 2).rate(ranks=1, running=3600))
            failures every 90.0 min (2 observed)
            >>> print(Observed().rate(ranks=8, running=0))
            failures every 24.0 h (assumed)
            >>> print(Observed().rate(ranks=16_384, running=0))
            failures every 3.1 h (assumed)
        """
        if self.failures:
            mean = (self.seconds + running) / self.failures
            return FailureRate(max(mean, _LEAST_MEAN), "observed", self.failures)
        return FailureRate(min(PUBLISHED_FAILURES.gpu_days * DAY / ranks, DAY), "assumed")


def _date_of(record: Mapping[str, object]) -> float | None:
    """Return when it was, in seconds since 1970; None: it does not say so."""
    try:
        return datetime.fromisoformat(str(record["at"])).timestamp()
    except (KeyError, ValueError, OverflowError, OSError):  # none, or one of no calendar
        return None


_MOST = 1e9  # seconds of a save: what is more was not measured

_UNMEASURED_LOST = 1.0  # seconds: until a save was measured, one is taken to cost so much
_FIRST_INTERVAL = 600.0  # seconds: the longest wait for something to measure


@dataclass(frozen=True)
class UsualCost:
    """What a save of a run usually takes.

    Attributes:
        lost: Seconds of training that one costs.
        durable: Seconds until the checkpoint is durable.
    """

    lost: float
    durable: float

    @classmethod
    def last_of(cls, history: Iterable[Mapping[str, object]]) -> UsualCost | None:
        """Return the cost of a save that the run last wrote into history.jsonl, if there is one.

        Example:
            >>> UsualCost.last_of([{"cadence": {"cost": {"lost": 0.5, "durable": 2.0}}}])
            UsualCost(lost=0.5, durable=2.0)
        """
        found = None
        for record in history:
            cadence = record.get("cadence")
            cost = cadence.get("cost") if isinstance(cadence, Mapping) else None
            if isinstance(cost, Mapping):
                lost, durable = _seconds(cost.get("lost")), _seconds(cost.get("durable"))
                found = found if lost is None or durable is None else cls(lost, durable)
        return found


def _seconds(value: object) -> float | None:
    if isinstance(value, int | float) and 0 <= value < _MOST:
        return float(value)
    return None


@dataclass(frozen=True)
class SaveInterval:
    """The time between saves of a run, and what it follows from.

    Attributes:
        seconds: Of training between two saves.
        step_seconds: What a step takes; None: not known yet.
        cost: What a save costs; None: none was measured.
        failures: How often the run fails; None: that did not count.
        most: Seconds of training that a failure may take at most; None: no such limit.

    Example:
        >>> interval = SaveInterval.best(
        ...     UsualCost(0.05, 0.05), FailureRate(11160, "given"), step_seconds=0.081
        ... )
        >>> print(interval)
        saves every 412 steps (33 s): a save costs 0.05 s, failures every 3.1 h (given)
    """

    seconds: float
    step_seconds: float | None = None
    cost: UsualCost | None = None
    failures: FailureRate | None = None
    most: float | None = None

    @classmethod
    def best(
        cls,
        cost: UsualCost | None,
        failures: FailureRate | None,
        *,
        most: float | None = None,
        step_seconds: float | None = None,
    ) -> SaveInterval:
        """Return the interval that loses least time (`best_interval`), within the limits.

        A save has to be durable before the next one begins: no limit makes it shorter than
        that. Until a save was measured, it is ten minutes at most.

        Args:
            cost: What a save costs; None: nothing was measured.
            failures: How often the run fails; None: `most` alone decides.
            most: Seconds that a failure may take at most, or None: with those of one step and
                those until a save is durable.
            step_seconds: What a step takes; None: not known yet.
        """
        lost, durable = (_UNMEASURED_LOST, 0.0) if cost is None else (cost.lost, cost.durable)
        limits = [] if most is None else [most - durable - (step_seconds or 0.0)]
        if failures is not None:
            limits.append(best_interval(max(lost, LEAST_LOST), failures.seconds))
            limits += [_FIRST_INTERVAL] if cost is None else []
        return cls(max(min(limits), durable), step_seconds, cost, failures, most)

    @property
    def steps(self) -> int | None:
        """About how many steps, at least 1; None: not known yet."""
        return max(1, round(self.seconds / self.step_seconds)) if self.step_seconds else None

    def is_worth_reporting(self, reported: SaveInterval | None) -> bool:
        """Return whether it differs enough from what was last reported for a new line."""
        if reported is None or (reported.cost is None) != (self.cost is None):
            return True
        # Steps come and go with the machine's load: only the seconds count.
        return _is_another(self.seconds, reported.seconds)

    def __str__(self) -> str:
        """Return it in one line."""
        seconds = seconds_text(self.seconds)
        every = seconds if self.steps is None else f"{self.steps} steps ({seconds})"
        if self.steps == 1:
            every = f"step ({seconds})"
        cost = None if self.cost is None else f"a save costs {seconds_text(self.cost.lost)}"
        failures = None if self.failures is None else str(self.failures)
        most = None if self.most is None else f"to lose {seconds_text(self.most)} at most"
        reasons = [reason for reason in (cost, failures, most) if reason is not None]
        return f"saves every {every}: {', '.join(reasons)}"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values, for history.jsonl; `text` is the line for people."""
        parts = {"cost": self.cost, "failures": self.failures}
        stored = {name: None if part is None else to_stored(part) for name, part in parts.items()}
        return {**to_stored(self), **stored, "steps": self.steps, "text": str(self)}


def _is_another(now: float, then: float) -> bool:
    return not 0.8 * then <= now <= 1.25 * then
