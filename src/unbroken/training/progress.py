"""How far a run is: the only counters of the loop, immutable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from unbroken.checkpoint import ResumeReport
from unbroken.data import BatchSource
from unbroken.errors import ConfigError, CorruptCheckpointError
from unbroken.stored_names import from_stored, to_stored
from unbroken.training.config import TrainerConfig


@dataclass(frozen=True)
class Progress:
    """The point that a run has reached.

    Attributes:
        step: Completed optimizer steps; 0 is the untrained model.
        samples: Training samples used, pending ones of an accumulation window included.
        tokens: Tokens used; 0 where the data has none (no `input_ids`).
        pending: Micro-batches of the unfinished step whose gradients are in the model.
        epoch: Completed passes over the data, with the started one as a fraction.

    Example:
        >>> progress = Progress().after_micro_batch(samples=8, tokens=512)
        >>> progress.after_step(epoch=0.25)
        Progress(step=1, samples=8, tokens=512, pending=0, epoch=0.25)
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    pending: int = 0
    epoch: float = 0.0

    @classmethod
    def of(cls, stored: object) -> Progress:
        """Return what a checkpoint says; None: it says nothing, as before the first step.

        Raises:
            CorruptCheckpointError: No run can be there.
        """
        numbers = {} if stored is None else stored
        names = [*to_stored(cls())]
        if not isinstance(numbers, Mapping) or not all(
            name in names and _counts(value, is_whole=name != "epoch")
            for name, value in numbers.items()
        ):
            what = "is not how far a run can be"
            raise CorruptCheckpointError("progress", what, expected=names, found=stored)
        progress: Progress = from_stored(cls, numbers)
        return progress

    def after_micro_batch(self, *, samples: int, tokens: int) -> Progress:
        """Return the progress after one more forward and backward pass.

        Args:
            samples: All samples used by then.
            tokens: Tokens in this micro-batch.
        """
        return Progress(self.step, samples, self.tokens + tokens, self.pending + 1, self.epoch)

    def after_step(self, epoch: float) -> Progress:
        """Return the progress after the optimizer's step."""
        return Progress(self.step + 1, self.samples, self.tokens, 0, epoch)


def _counts(value: object, *, is_whole: bool) -> bool:
    kinds = (int,) if is_whole else (int, float)
    return type(value) in kinds and 0 <= value < math.inf and value < 2**63  # type: ignore[operator]


# How many optimizer steps a run has, and in which epoch it is.


def count_steps(
    config: TrainerConfig, source: BatchSource | None, progress: Progress | None = None
) -> int:
    """Return the optimizer steps of the whole run.

    Args:
        config: `max_steps`, or else `num_train_epochs`.
        source: Knows the length of an epoch.
        progress: Where the run is; steps so far may have been of another size.

    Raises:
        ConfigError: If only `num_train_epochs` is given and an epoch has no known length.
    """
    if config.max_steps != -1:
        return config.max_steps
    if source is None:
        return 0
    if source.steps_per_epoch is None:
        raise ConfigError("max_steps", "must be given: the length of an epoch is not known")
    # By its decimal digits: 0.1 epochs of 10 steps are one step, not 1.00000000000000000555.
    steps = Fraction(repr(float(config.num_train_epochs))) * source.steps_per_epoch
    if progress is None or source.samples_per_epoch is None:
        return math.ceil(steps)
    in_whole_steps = progress.samples - progress.pending * config.per_forward
    left = steps - Fraction(in_whole_steps, config.batch_size)
    return progress.step + max(0, math.ceil(left))


def epoch_at(progress: Progress, source: BatchSource) -> float:
    """Return the passes over the data when the step that is just being taken is completed."""
    if source.samples_per_epoch is not None:
        return progress.samples / source.samples_per_epoch
    if source.steps_per_epoch is not None:
        return float((progress.step + 1) / source.steps_per_epoch)
    return float(source.position.epoch)


# How long steps and saves take: what is needed to stop in time.


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


# What `Trainer.train` returns.


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        progress: Where it ended.
        stopped_by: Why it ended before `max_steps`, or None.
        best_metric: The best value of `metric_for_best_model`, or None.
        resume_report: How this process's part of the run began.
    """

    progress: Progress
    stopped_by: str | None
    best_metric: float | None
    resume_report: ResumeReport
