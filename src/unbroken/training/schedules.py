"""Learning-rate schedules as functions of the step, so that a resumed run cannot miss one.

The shapes are those of `transformers.get_scheduler`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from unbroken.errors import ConfigError
from unbroken.training.config import TrainerConfig

Factor = Callable[[float], float]
"""From the share of the steps after warm-up (0 to 1) to a factor of the learning rate."""


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainerConfig, max_steps: int
) -> LRScheduler:
    """Return the schedule that the configuration names.

    Args:
        optimizer: Whose learning rates to set.
        config: `lr_scheduler_type`, `lr_scheduler_kwargs`, `warmup_steps`.
        max_steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: If `lr_scheduler_kwargs` holds a setting that the schedule does not have.
    """
    settings = dict(config.lr_scheduler_kwargs or {})
    if config.lr_scheduler_type == "reduce_lr_on_plateau":
        mode = "max" if config.greater_is_better else "min"
        return ReduceLROnPlateau(optimizer, mode=mode, **settings)  # type: ignore[arg-type]
    return LambdaLR(optimizer, factor_of(config, max_steps))


def factor_of(config: TrainerConfig, max_steps: int) -> Factor:
    """Return the schedule that the configuration names, as a function of the step.

    One that follows a metric has no such function: its factor is 1.

    Example:
        >>> factor_of(TrainerConfig(lr_scheduler_type="linear"), max_steps=10)(5)
        0.5
    """
    warmup = _warmup_steps(config, max_steps)
    curve = _curve(config, dict(config.lr_scheduler_kwargs or {}), warmup)
    return warmed_up(curve, warmup, max_steps)


def warmed_up(curve: Callable[[int, int], float], warmup: int, max_steps: int) -> Factor:
    """Return the factor of each step: a line from 0 during warm-up, then `curve`.

    Args:
        curve: From (steps after warm-up, all steps after warm-up) to a factor.
        warmup: Steps of warm-up.
        max_steps: All steps.

    Example:
        >>> factor = warmed_up(lambda done, total: 1 - done / total, warmup=2, max_steps=6)
        >>> [factor(step) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def factor(step: float) -> float:
        if step < warmup:
            return step / warmup
        total = max(1, max_steps - warmup)
        return curve(min(int(step) - warmup, total), total)

    return factor


def _warmup_steps(config: TrainerConfig, max_steps: int) -> int:
    if 0 < config.warmup_steps < 1:
        return math.ceil(config.warmup_steps * max_steps)
    return int(config.warmup_steps)


def _curve(
    config: TrainerConfig, settings: dict[str, float], warmup: int
) -> Callable[[int, int], float]:
    name = config.lr_scheduler_type
    allowed = _SETTINGS.get(name, {})
    for key in settings if name != "reduce_lr_on_plateau" else ():
        if key not in allowed:
            raise ConfigError(
                f"lr_scheduler_kwargs.{key}",
                f"is no setting of {name}",
                expected=", ".join(allowed) or "none",
            )
    values = {**allowed, **settings}
    if name in ("constant", "constant_with_warmup", "reduce_lr_on_plateau"):
        return lambda done, total: 1.0
    if name == "linear":
        return lambda done, total: 1 - done / total
    if name == "inverse_sqrt":
        timescale = values["timescale"] or warmup or 10_000
        return lambda done, total: math.sqrt(timescale / (done + timescale))
    if name == "polynomial":
        return lambda done, total: _polynomial(done / total, config.learning_rate, values)
    if name == "cosine_with_restarts":
        return lambda done, total: _restarting_cosine(done / total, values["num_cycles"])
    return lambda done, total: _cosine(done / total, values)


_SETTINGS: dict[str, dict[str, float]] = {
    "inverse_sqrt": {"timescale": 0},
    "polynomial": {"lr_end": 1e-7, "power": 1.0},
    "cosine": {"num_cycles": 0.5, "min_lr_rate": 0.0},
    "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr_rate": 0.1},
    "cosine_with_restarts": {"num_cycles": 1},
}


def _cosine(share: float, values: dict[str, float]) -> float:
    wave = 0.5 * (1 + math.cos(math.pi * values["num_cycles"] * 2 * share))
    return max(0.0, values["min_lr_rate"] + (1 - values["min_lr_rate"]) * wave)


def _restarting_cosine(share: float, num_cycles: float) -> float:
    if share >= 1:
        return 0.0
    return max(0.0, 0.5 * (1 + math.cos(math.pi * ((num_cycles * share) % 1.0))))


def _polynomial(share: float, learning_rate: float, values: dict[str, float]) -> float:
    if learning_rate == 0:
        return 0.0
    end = values["lr_end"] / learning_rate
    return float((1 - end) * (1 - share) ** values["power"] + end)
