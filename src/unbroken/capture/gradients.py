"""Gradients that wait for the next optimizer step, by the names of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from unbroken.capture.mismatch import Mismatch, raise_all
from unbroken.capture.modules import named_parameters
from unbroken.capture.stored import StoredTensor, describe

Parameters = nn.Module | Mapping[str, torch.Tensor]
"""A module, or parameters by name."""

Gradient = torch.Tensor | StoredTensor


def capture_gradients(parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return the gradients by parameter name; parameters without one are left out.

    Args:
        parameters: A module, or parameters by name.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model.weight.grad = torch.ones(1, 2)
        >>> capture_gradients(model)
        {'weight': tensor([[1., 1.]])}
    """
    return {name: p.grad for name, p in _by_name(parameters).items() if p.grad is not None}


def restore_gradients(parameters: Parameters, tree: Mapping[str, Gradient]) -> None:
    """Give every parameter exactly the gradient captured; none where there was none.

    Args:
        parameters: A module, or parameters by name.
        tree: What `capture_gradients` returned; its tensors may be stored ones.

    Raises:
        StateMismatchError: A gradient has no parameter here, or another shape; nothing was changed.
    """
    live = _by_name(parameters)
    check_gradients(parameters, tree)
    for name, parameter in live.items():
        stored = tree.get(name)
        if stored is None:
            parameter.grad = None
        elif parameter.grad is not None and _fits(parameter.grad, stored):
            _copy(stored, parameter.grad)
        else:
            parameter.grad = _new(stored, parameter)


def check_gradients(parameters: Parameters, tree: Mapping[str, Gradient]) -> None:
    """Raise where `restore_gradients` would.

    Raises:
        StateMismatchError: A gradient has no parameter here, or another shape.
    """
    raise_all(_check(_by_name(parameters), tree))


def _by_name(parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return each parameter once, under its first name."""
    pairs = (
        named_parameters(parameters) if isinstance(parameters, nn.Module) else parameters.items()
    )
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, parameter in pairs:
        first.setdefault(id(parameter), (name, parameter))
    return dict(first.values())


def _check(live: Mapping[str, torch.Tensor], tree: Mapping[str, Gradient]) -> Iterator[Mismatch]:
    for name, stored in tree.items():
        if name not in live:
            yield Mismatch(f"gradients.{name}", "no such parameter is here")
        elif tuple(stored.shape) != tuple(live[name].shape):
            expected = stored if isinstance(stored, StoredTensor) else describe(stored)
            here = describe(live[name])
            yield Mismatch(f"gradients.{name}", "has another shape", expected, here)


def _fits(gradient: torch.Tensor, stored: Gradient) -> bool:
    """Tell whether a gradient can be filled in place, as views on DDP's buckets must be."""
    stride = stored.view.stride if isinstance(stored, StoredTensor) else stored.stride()
    same = (gradient.dtype, tuple(gradient.shape)) == (stored.dtype, tuple(stored.shape))
    return same and gradient.stride() == stride


def _copy(stored: Gradient, gradient: torch.Tensor) -> None:
    if isinstance(stored, StoredTensor):
        stored.copy_into(gradient)
    else:
        gradient.detach().copy_(stored)


def _new(stored: Gradient, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(stored, StoredTensor):
        return stored.load_like(parameter)
    return stored.detach().to(parameter.device, copy=True)
