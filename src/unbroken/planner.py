"""Planning for a cluster that is not here: how often to save, and what failures will cost.

A tool beside the library: nothing that trains or saves imports it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from unbroken.errors import ConfigError
from unbroken.goodput import (
    DAY,
    LEAST_LOST,
    PUBLISHED_FAILURES,
    Rhythm,
    best_interval,
    seconds_text,
)

# A cluster and a model, as few numbers: how much there is to save, and how often it fails.

Optimizer = Literal["adamw", "adamw-bf16", "adamw-8bit", "lion", "momentum", "sgd"]
"""What is kept for each parameter: two moments in fp32, bf16 or one byte, one moment, nothing."""

MOMENT_BYTES: dict[Optimizer, int] = {
    "adamw": 8,
    "adamw-bf16": 4,
    "adamw-8bit": 2,
    "lion": 4,
    "momentum": 4,
    "sgd": 0,
}


@dataclass(frozen=True)
class Cluster:
    """A cluster, and what it trains.

    Args:
        gpus: How many; each brings its part of hosts, network and power.
        parameters: Of the model.
        bandwidth: Of the storage, for the whole cluster together: bytes a second.
        optimizer: Which moments belong to the state.
        parameter_bytes: Of one parameter as it is saved; 4: fp32 masters.
        gpu_days: Mean days between failures of one GPU.
        lost: Seconds of training that one save costs; None: it blocks until it is durable.
        starting: Seconds from a failure until the state is read: find it, replace, start.

    Raises:
        ConfigError: A field is negative, endless or, where that makes no sense, 0.

    Example:
        >>> cluster = Cluster(gpus=16_384, parameters=405e9, bandwidth=2e12)
        >>> f"{cluster.state_bytes / 1e12:.2f} TB, {cluster.between_failures / 3600:.1f} h"
        '4.86 TB, 3.1 h'
        >>> rhythm = cluster.rhythm()
        >>> f"{rhythm.interval / 60:.1f} min, {rhythm.goodput:.1%}"
        '3.9 min, 95.3%'
    """

    gpus: int
    parameters: float
    bandwidth: float
    optimizer: Optimizer = "adamw"
    parameter_bytes: int = 4
    gpu_days: float = PUBLISHED_FAILURES.gpu_days
    lost: float | None = None
    starting: float = 300.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:  # as much as one likes: saving then costs what `lost` says
            raise ConfigError("bandwidth", "must be positive", found=self.bandwidth)
        for name in ("gpus", "parameters", "parameter_bytes", "gpu_days"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(name, "must be positive and finite", found=getattr(self, name))
        for name in ("lost", "starting"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                what = "must be a number of seconds, at least 0"
                raise ConfigError(name, what, found=getattr(self, name))

    @property
    def state_bytes(self) -> float:
        """Bytes of one checkpoint."""
        return self.parameters * (self.parameter_bytes + MOMENT_BYTES[self.optimizer])

    @property
    def transfer(self) -> float:
        """Seconds to write or to read one checkpoint, all ranks together."""
        return self.state_bytes / self.bandwidth

    @property
    def between_failures(self) -> float:
        """Mean seconds from one failure anywhere to the next."""
        return self.gpu_days * DAY / self.gpus

    def rhythm(self, interval: float | None = None) -> Rhythm:
        """Return the seconds of training, saving and starting.

        Args:
            interval: Seconds of training between saves; None: the best. A save has to be
                durable before the next one begins, so it is never less than that takes.
        """
        lost = self.transfer if self.lost is None else self.lost
        until_durable = 0.0 if self.lost is None else self.transfer
        if interval is None:
            interval = best_interval(max(lost, LEAST_LOST), self.between_failures)
        return Rhythm(
            max(interval, until_durable),
            lost,
            until_durable,
            self.starting + self.transfer,
            self.between_failures,
        )


# Failures, saves and starts played event by event, to check the formula of `Rhythm`.


@dataclass(frozen=True)
class Simulated:
    """What the simulation found.

    Attributes:
        goodput: The part of wall-clock time that trained and was kept.
        error: Its standard error: the formula should be within three of it.
        failures: How many failures were played.
    """

    goodput: float
    error: float
    failures: int


def simulate(
    rhythm: Rhythm, rng: random.Random, *, runs: int = 40, failures: int = 500
) -> Simulated:
    """Play `runs` trainings of `failures` failures each, and count what was kept.

    Nothing of the formula is used: time goes from failure to failure, each throws the training back
    to the last save that was durable by then, a start can be broken off by the next failure. How
    many saves lie between two failures is counted at once: there may be billions.

    Args:
        rhythm: The seconds of everything.
        rng: Where the moments of failures come from.
        runs: How many trainings; at least 2, for the error.
        failures: How many failures each of them has.

    Example:
        >>> rhythm = Rhythm(458, lost=10, until_durable=0, restart=300, between_failures=10800)
        >>> found = simulate(rhythm, random.Random(0))
        >>> abs(found.goodput - rhythm.goodput) < 3 * found.error < 0.01
        True
    """
    parts = [_play(rhythm, rng, failures) for _ in range(runs)]
    return Simulated(fmean(parts), stdev(parts) / math.sqrt(runs), runs * failures)


def _play(rhythm: Rhythm, rng: random.Random, failures: int) -> float:
    """Return what part of one training's time was kept."""
    now = kept = 0.0
    for _ in range(failures):
        fails_at = now + rng.expovariate(1 / rhythm.between_failures)
        kept += _kept_until(fails_at, now, rhythm)
        now = _trains_again_at(fails_at, rng, rhythm)
    return kept / now


def _kept_until(fails_at: float, now: float, rhythm: Rhythm) -> float:
    """Train and save from `now` on; return the seconds of training that are durable at the end."""
    durable = (fails_at - now - rhythm.until_durable) // (rhythm.interval + rhythm.lost)
    return max(durable, 0.0) * rhythm.interval


def _trains_again_at(failed_at: float, rng: random.Random, rhythm: Rhythm) -> float:
    """Return when a start after a failure came to its end, which another failure may delay."""
    now = failed_at
    while True:
        fails_after = rng.expovariate(1 / rhythm.between_failures)
        if fails_after >= rhythm.restart:
            return now + rhythm.restart
        now += fails_after


# The best rhythm of training and saving for a cluster, by formula and by simulation.


@dataclass(frozen=True)
class ClusterPlan:
    """A cluster, the best rhythm for it, and what becomes of others.

    Attributes:
        cluster: As asked for.
        rhythm: With the best interval.
        simulated: The same rhythm, played event by event.
        kept: Checkpoints that are kept.
        step_seconds: Of one training step; None: not given.
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
