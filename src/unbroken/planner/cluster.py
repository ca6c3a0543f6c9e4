"""A cluster and a model, as few numbers: how much there is to save, and how often it fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from unbroken.errors import ConfigError
from unbroken.goodput import PUBLISHED_FAILURES, Rhythm, best_interval
from unbroken.goodput.cadence import DAY, LEAST_LOST

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
