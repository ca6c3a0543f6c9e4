"""How many optimizer steps a run has, and in which epoch it is."""

from __future__ import annotations

import math
from fractions import Fraction

from unbroken.data import BatchSource
from unbroken.errors import ConfigError
from unbroken.training.config import TrainerConfig
from unbroken.training.progress import Progress


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
