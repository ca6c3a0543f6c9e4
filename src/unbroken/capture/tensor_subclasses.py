"""Tensor subclasses that come apart into plain tensors, such as quantized ones of torchao.

PyTorch's protocol for them is `__tensor_flatten__`, which names the inner tensors and gives the
rest of what makes the tensor, and `__tensor_unflatten__`, which puts it together again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

_PROTOCOL = ("__tensor_flatten__", "__tensor_unflatten__")


def comes_apart(value: object) -> bool:
    """Return whether a value is a tensor subclass whose inner tensors are all there is to it.

    PyTorch's own are none: a sharded tensor is stored by all ranks together, a nested one is not.
    """
    return isinstance(value, torch.Tensor) and _is_one(type(value))


def _is_one(kind: type) -> bool:
    if kind is torch.Tensor or kind.__module__.partition(".")[0] == "torch":
        return False
    return all(hasattr(kind, name) for name in _PROTOCOL)


def parts_of(value: Any) -> tuple[dict[str, Any], Any]:
    """Return the inner tensors of a tensor by name, and what else it is made with."""
    names, context = value.__tensor_flatten__()
    return {str(name): getattr(value, name) for name in names}, context


def classes_at_hand(objects: Iterable[object]) -> frozenset[type]:
    """Return the tensor subclasses that the modules of these optimizers' classes name.

    An optimizer makes its state in its first step. Before that its code alone tells of which
    classes it is.
    """
    found: set[type] = set()
    for one in objects:
        if isinstance(one, Optimizer):
            for kind in type(one).__mro__:
                found |= _named_in(vars(sys.modules.get(kind.__module__, object)))
    return frozenset(found)


def _named_in(space: Mapping[str, object]) -> set[type]:
    return {one for one in space.values() if isinstance(one, type) and _is_one(one)}
