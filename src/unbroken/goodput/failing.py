"""How often a run fails: as told, as its own history says, or as is assumed until then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from unbroken.goodput.cluster import DAY, PUBLISHED_FAILURES
from unbroken.goodput.durations import seconds_text

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
        told = f"{self.count} observed" if self.source == "observed" else self.source
        return f"failures every {seconds_text(self.seconds)} ({told})"


@dataclass(frozen=True)
class Observed:
    """What a run went through.

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
