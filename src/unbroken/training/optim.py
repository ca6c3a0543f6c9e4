"""The optimizer that the configuration names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from unbroken.distributed.dtensors import is_dtensor
from unbroken.errors import ConfigError
from unbroken.stored_names import stored_name
from unbroken.training.config import TrainerConfig

_FUSED = ("cpu", "cuda", "mps", "xpu")


def refuse_closures(optimizer: Optimizer) -> None:
    """Raise for an optimizer that evaluates the model itself.

    Raises:
        ConfigError: If it is LBFGS.
    """
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "optimizer",
            "LBFGS evaluates the model several times a step, which this loop does not",
            hint="write the loop yourself, with Checkpointer",
        )


def make_optimizer(model: nn.Module, config: TrainerConfig) -> Optimizer:
    """Return the optimizer over the parameters of `model` that require a gradient.

    One-dimensional parameters (biases, norms) and scalars get no weight decay.
    """
    groups = parameter_groups(model, config.weight_decay)
    one_by_one = False if _is_sharded_in_part(model) else None
    if config.optim == "sgd":
        momentum = config.sgd_momentum
        return SGD(groups, lr=config.learning_rate, momentum=momentum, foreach=one_by_one)
    if config.optim == "adafactor":
        return Adafactor(groups, lr=config.learning_rate, foreach=one_by_one)
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        foreach=one_by_one,
        fused=True if config.optim == "adamw_torch_fused" and _can_be_fused(model) else None,
    )


def _can_be_fused(model: nn.Module) -> bool:
    """Return whether PyTorch has a fused kernel for every parameter (it has none for complex)."""
    return not _is_sharded_in_part(model) and all(
        p.is_floating_point() and p.device.type in _FUSED for p in model.parameters()
    )


def _is_sharded_in_part(model: nn.Module) -> bool:
    """Return whether some parameters are DTensors and some are not: no kernel takes both."""
    return len({is_dtensor(parameter) for parameter in model.parameters()}) > 1


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return the trained parameters in two groups: with and without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# Learning-rate schedules as functions of the step, so that a resumed run cannot miss one.
#
# The shapes are those of `transformers.get_scheduler`.


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
    stored_name("unbroken.training.schedules._curve.<locals>.<lambda>")(curve)
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

    @stored_name("unbroken.training.schedules.warmed_up.<locals>.factor")
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
