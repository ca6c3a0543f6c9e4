"""When something is due: every so many steps, every so many minutes, or both."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import Literal

from unbroken.checkpoint.save.async_saver import SaveCost, SaveMode
from unbroken.checkpoint.save.session import Layout
from unbroken.distributed import Group
from unbroken.errors import ConfigError
from unbroken.goodput import FailureRate, Observed, SaveInterval, UsualCost
from unbroken.store import Json

Seconds = Callable[[], float]
"""A monotonic clock, as `time.monotonic` is one."""


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

    def __init__(self, cadence: Cadence, clock: Seconds) -> None:
        self._cadence = cadence
        self._clock = clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Return whether it is due after `step` completed steps."""
        return self._cadence.is_due(step, self._clock() - self._last)

    def done(self) -> None:
        """Count the minutes from now on."""
        self._last = self._clock()


# When to save: at fixed steps and minutes, or as often as loses least time.


SaveSteps = int | Literal["auto"] | None
"""Every so many steps; "auto": as often as loses least time; None: not by steps."""

_REMEMBERED = 7  # saves: few enough to follow a disk that becomes slower


@dataclass(frozen=True)
class SavePolicy:
    """When a run is saved, how a save gets hold of the state, and how its folder looks.

    Args:
        steps: Every so many steps; "auto": as often as loses least time, by what saves cost and how
            often the run fails.
        minutes: ... and every so many minutes.
        max_lost_minutes: ... and so often that a failure takes no more than this.
        mtbf_hours: Mean time between failures, for "auto"; None: as the history of the run says.
        mode: "blocking": the state is written while the caller waits. "async": it is copied, and
            written while training goes on. "overlap": parameters and optimizer state are copied
            under the next forward and backward passes; the optimizer's next step waits for that.
            If something else changes such a tensor before then, the checkpoint of the next step
            is made instead. A change through `.data`, or from outside PyTorch, is found by
            digests: of all bytes in the first save, and of at least 8 MiB of the tensors, in turn,
            in each later one; of the others by a sample. So an edit of a few elements that begins
            after the first save is found by their turn, which comes within 64 saves; on devices,
            where samples alone are taken, it may be missed. Both modes need one more copy of what
            a rank stores.
        layout: Returns for the objects how the folder of a checkpoint looks.

    Example:
        >>> SavePolicy(steps=500, mode="async").minutes
    """

    steps: SaveSteps = None
    minutes: float | None = None
    max_lost_minutes: float | None = None
    mtbf_hours: float | None = None
    mode: SaveMode = "blocking"
    layout: Callable[[Mapping[str, object]], Layout] = Layout.of

    @property
    def has_cadence(self) -> bool:
        """Whether it says when to save."""
        return any(one is not None for one in (self.steps, self.minutes, self.max_lost_minutes))


class SaveTimer:
    """Says when a run is to be saved; the ranks of a group always hear the same.

    Args:
        policy: When.
        group: The ranks. The clock of rank 0 decides what "auto" and `max_lost_minutes` mean.
        clock: Monotonic seconds.

    Raises:
        ConfigError: If a value is not positive, or does not fit the others.
    """

    def __init__(self, policy: SavePolicy, *, group: Group, clock: Seconds) -> None:
        steps, minutes = policy.steps, policy.minutes
        max_lost_minutes, mtbf_hours = policy.max_lost_minutes, policy.mtbf_hours
        if not (steps is None or steps == "auto" or type(steps) is int):  # True is an int, too
            raise ConfigError("save_steps", expected='a whole number or "auto"', found=repr(steps))
        for name, value in (("max_lost_minutes", max_lost_minutes), ("mtbf_hours", mtbf_hours)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(name, "must be positive and finite", found=value)
        if mtbf_hours is not None and steps != "auto":
            raise ConfigError("mtbf_hours", 'needs save_steps="auto"', found=f"save_steps={steps}")
        self._fixed = Timer(Cadence(None if steps == "auto" else steps, minutes), clock)
        self._group = group
        self._least: LeastLost | None = None
        self._reported: SaveInterval | None = None
        if steps == "auto" or max_lost_minutes is not None:
            most = None if max_lost_minutes is None else max_lost_minutes * 60
            given = None if mtbf_hours is None else FailureRate(mtbf_hours * 3600, "given")
            ranks = group.world_size if steps == "auto" else None
            self._least = LeastLost(ranks=ranks, given=given, most=most, clock=clock)
        self._by_time = minutes is not None or self._least is not None

    def begin(self, step: int, history: Iterable[Mapping[str, object]]) -> None:
        """Start at a step, with what the run went through so far; on rank 0 it is read."""
        self._fixed.done()
        if self._least is not None and self._group.rank == 0:
            self._least.begin(step, list(history))

    def due(self, step: int, *, again: bool, cost: SaveCost | None) -> bool:
        """Return whether to save after `step` steps.

        Args:
            step: Completed optimizer steps.
            again: Whether to save whatever the time is.
            cost: What the last finished save took.
        """
        due = self._fixed.due(step) or again
        if self._least is not None and self._group.rank == 0:
            due |= self._least.due(step, cost)
        return self._group.any(due) if self._by_time else due

    def done(self, step: int) -> None:
        """Count the time from now on."""
        self._fixed.done()
        if self._least is not None:
            self._least.done(step)

    def interval(self, cost: SaveCost | None) -> SaveInterval | None:
        """Return how often the run saves by itself; None: at fixed times, or on another rank."""
        if self._least is None or self._group.rank > 0:
            return None
        return self._least.interval(cost)

    def history_fields(self, cost: SaveCost | None) -> dict[str, Json]:
        """Return what the history is to be told of the interval, if that is new."""
        now = self.interval(cost)
        if now is None or not now.is_worth_reporting(self._reported):
            return {}
        self._reported = now
        return {"cadence": now.to_json()}


class LeastLost:
    """Follows the saves and the steps of a run, to save as often as loses least time.

    Args:
        ranks: How many fail together; None: failures do not count, `most` alone decides.
        given: How often the run fails, if it is known.
        most: Seconds that a failure may take at most; None: no limit.
        clock: Monotonic seconds.

    Example:
        >>> now = [0.0]
        >>> timer = LeastLost(ranks=1, given=None, most=100.0, clock=lambda: now[0])
        >>> now[0] = 60.0
        >>> timer.due(1, None)  # one step of 60 s more would be too many
        True
        >>> timer.done(1)
        >>> timer.due(1, None)
        False
    """

    def __init__(
        self, *, ranks: int | None, given: FailureRate | None, most: float | None, clock: Seconds
    ) -> None:
        self._ranks = ranks
        self._given = given
        self._most = most
        self._clock = clock
        self._costs: deque[SaveCost] = deque(maxlen=_REMEMBERED)
        self._first: SaveCost | None = None
        self._latest: SaveCost | None = None
        self._before: UsualCost | None = None
        self._observed = Observed()
        self._began = self._last = clock()
        self._last_step: int | None = None
        self._step_seconds: float | None = None
        self._interval = self._computed()

    def begin(self, step: int, history: list[Mapping[str, object]]) -> None:
        """Start at a step, with what the run went through so far."""
        self._observed = Observed.of(history)
        self._before = UsualCost.last_of(history)
        self._began = self._clock()
        self.done(step)
        self._interval = self._computed()

    def due(self, step: int, cost: SaveCost | None) -> bool:
        """Return whether to save after `step` steps; `cost` is that of the last finished save."""
        since = self._clock() - self._last
        steps = step - (0 if self._last_step is None else self._last_step)
        if steps > 0:
            self._step_seconds = since / steps
        return since >= self.interval(cost).seconds

    def done(self, step: int) -> None:
        """Count the time from now on."""
        self._last, self._last_step = self._clock(), step

    def interval(self, cost: SaveCost | None) -> SaveInterval:
        """Return how often to save, after what the last finished save took."""
        if self._learn(cost) or self._steps_changed():
            self._interval = self._computed()
        return self._interval

    def _learn(self, cost: SaveCost | None) -> bool:
        """Return whether this is a save that was not counted yet."""
        if cost is None or cost is self._latest:
            return False
        self._latest = cost
        if self._first is None:
            self._first = cost  # into fresh memory and new files, and maybe without moments
        else:
            self._costs.append(cost)
        return True

    def _usual_cost(self) -> UsualCost | None:
        if self._before is not None and not self._costs:
            return self._before
        costs = self._costs or ([] if self._first is None else [self._first])
        if not costs:
            return None
        lost = median_low(cost.blocked + cost.computing for cost in costs)
        durable = [cost.durable for cost in costs]  # under a limit, which is a promise: the slowest
        return UsualCost(lost, median_low(durable) if self._most is None else max(durable))

    def _steps_changed(self) -> bool:
        """Return whether steps take another time than the interval was computed with."""
        now, then = self._step_seconds, self._interval.step_seconds
        return now is not None and (then is None or abs(now - then) > 0.1 * then)

    def _computed(self) -> SaveInterval:
        failures = self._given
        if failures is None and self._ranks is not None:
            failures = self._observed.rate(self._ranks, self._clock() - self._began)
        return SaveInterval.best(
            self._usual_cost(), failures, most=self._most, step_seconds=self._step_seconds
        )
