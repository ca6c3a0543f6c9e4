"""The best rhythm of training and saving for a cluster, by formula and by simulation."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from unbroken.errors import ConfigError
from unbroken.goodput import Rhythm, seconds_text
from unbroken.planner.cluster import Cluster
from unbroken.planner.simulation import Simulated, simulate


@dataclass(frozen=True)
class ClusterPlan:
    """A cluster, the best rhythm for it, and what becomes of others.

    Attributes:
        cluster: As asked for.
        rhythm: With the best interval.
        simulated: The same rhythm, played event by event.
        kept: Checkpoints that are kept.
        step_seconds: Of one training step; None: not told.
    """

    cluster: Cluster
    rhythm: Rhythm
    simulated: Simulated
    kept: int
    step_seconds: float | None

    @property
    def save_steps(self) -> int | None:
        """The interval in steps, at least 1."""
        if self.step_seconds is None:
            return None
        return max(1, round(self.rhythm.interval / self.step_seconds))

    @property
    def storage_bytes(self) -> float:
        """What the kept checkpoints take, and the one being written."""
        return self.cluster.state_bytes * (self.kept + 1)


def make_plan(
    cluster: Cluster, *, kept: int, step_seconds: float | None = None, seed: int = 0
) -> ClusterPlan:
    """Return the best rhythm for a cluster, checked by simulation.

    Raises:
        ConfigError: `kept` or `step_seconds` is not positive, or nothing would ever be kept.

    Example:
        >>> cluster = Cluster(gpus=1024, parameters=8e9, bandwidth=50e9, lost=0.5)
        >>> plan = make_plan(cluster, kept=3, step_seconds=2.0)
        >>> plan.save_steps, f"{plan.rhythm.goodput:.1%}"
        (211, '99.6%')
    """
    if kept < 1:
        raise ConfigError("--keep", expected="at least 1", found=kept)
    if step_seconds is not None and not 0 < step_seconds < math.inf:
        raise ConfigError("--step-seconds", expected="more than 0", found=step_seconds)
    rhythm = cluster.rhythm()
    if step_seconds is not None:  # a save comes after a step, not in the middle of one
        rhythm = cluster.rhythm(max(1, round(rhythm.interval / step_seconds)) * step_seconds)
    if rhythm.goodput < 0.001:
        raise ConfigError(
            "unbroken plan",
            "this training would never get on",
            expected="failures much rarer than saves and starts take",
            found=f"a failure every {seconds_text(rhythm.between_failures)}, "
            f"{seconds_text(rhythm.restart)} to start again, "
            f"{seconds_text(cluster.transfer)} to save",
            hint="more bandwidth, fewer GPUs, or less to save",
        )
    simulated = simulate(rhythm, random.Random(seed))  # noqa: S311  (nothing secret)
    return ClusterPlan(cluster, rhythm, simulated, kept, step_seconds)
