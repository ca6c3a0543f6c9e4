"""The optimizer that the configuration names."""

from __future__ import annotations

from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer

from unbroken.distributed.sharding import is_dtensor
from unbroken.errors import ConfigError
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
