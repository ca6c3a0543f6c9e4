"""The optimizer that the configuration names."""

from __future__ import annotations

from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer

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
    if config.optim == "sgd":
        return SGD(groups, lr=config.learning_rate, momentum=config.sgd_momentum)
    if config.optim == "adafactor":
        return Adafactor(groups, lr=config.learning_rate)
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True if config.optim == "adamw_torch_fused" and _can_be_fused(model) else None,
    )


def _can_be_fused(model: nn.Module) -> bool:
    """Return whether PyTorch has a fused kernel for every parameter (it has none for complex)."""
    return all(p.is_floating_point() and p.device.type in _FUSED for p in model.parameters())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return the trained parameters in two groups: with and without weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
