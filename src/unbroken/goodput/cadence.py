"""How often a run saves by itself, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from unbroken.goodput.durations import seconds_text
from unbroken.goodput.failing import FailureRate
from unbroken.goodput.interval import best_interval

_MOST = 1e9  # seconds of a save: what is more was not measured

_LEAST_LOST = 1e-3  # seconds: a save that costs nothing would be made all the time
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
        """Return what a save took when the run last told it in history.jsonl, if it ever did.

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
            limits.append(best_interval(max(lost, _LEAST_LOST), failures.seconds))
            limits += [_FIRST_INTERVAL] if cost is None else []
        return cls(max(min(limits), durable), step_seconds, cost, failures, most)

    @property
    def steps(self) -> int | None:
        """About how many steps, at least 1; None: not known yet."""
        return max(1, round(self.seconds / self.step_seconds)) if self.step_seconds else None

    def is_news(self, told: SaveInterval | None) -> bool:
        """Return whether it is worth a line after what was told last."""
        if told is None or (told.cost is None) != (self.cost is None):
            return True
        return _is_another(self.seconds, told.seconds)  # steps come and go with the machine's load

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
        return {**asdict(self), "steps": self.steps, "text": str(self)}


def _is_another(now: float, then: float) -> bool:
    return not 0.8 * then <= now <= 1.25 * then
