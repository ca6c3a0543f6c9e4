"""What an optimizer holds: parameters, gradients, moments, step counts, settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .digests import GroupDigest, TensorDigester, digest_of

_COUNT = "step"


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor | None]:
    """Return the gradient of each parameter, None where there is none."""
    return [parameter.grad for parameter in parameters_of(optimizer)]


def learning_rates_of(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each group."""
    return [float(group.get("lr", 0.0)) for group in optimizer.param_groups]


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the other settings of each group that are plain values (weight decay, betas, ...)."""
    left_out = ("params", "lr", "initial_lr", "param_names")
    return [
        {name: _plain(value) for name, value in group.items() if name not in left_out}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def moments_digest(optimizer: Optimizer, digester: TensorDigester) -> GroupDigest:
    """Return the digest of all tensors of the state but the step counts."""
    return digester.of_all(_moments(optimizer))


def has_moments(optimizer: Optimizer) -> bool:
    """Return whether any tensor of the state but the step counts has an element that is not 0."""
    return any(bool(moment.any()) for moment in _moments(optimizer))


def counts_digest(optimizer: Optimizer) -> str:
    """Return the digest of the step counts and of all other numbers of the state."""
    numbers: list[tuple[str, bool | float | str]] = []
    for state in _states(optimizer):
        for name in sorted(state, key=str):
            value = state[name]
            if isinstance(value, Tensor) and name == _COUNT:
                numbers.append((name, float(value)))
            elif isinstance(value, (bool, int, float, str)):
                numbers.append((name, float(value) if name == _COUNT else value))
    return digest_of(repr(numbers).encode())


def _moments(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in _states(optimizer):
        for name in sorted(state, key=str):
            if isinstance(state[name], Tensor) and name != _COUNT:
                yield state[name]


def _states(optimizer: Optimizer) -> Iterator[dict[Any, Any]]:
    for parameter in parameters_of(optimizer):
        yield optimizer.state.get(parameter, {})  # get: reading a missing one would make it
