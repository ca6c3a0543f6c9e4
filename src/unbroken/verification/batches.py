"""A batch copied, so that a second pass reads what the first one read."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import numpy as np
from torch import Tensor


def cloned(data: Any, known: dict[int, Any] | None = None) -> Any:
    """Return a batch with tensors and arrays of its own; what is none of these stays the same.

    A tensor that stands in it twice is one tensor in the copy, too.

    Example:
        >>> import torch
        >>> batch = {"x": torch.ones(2), "name": "a"}
        >>> copied = cloned(batch)
        >>> copied["x"].add_(1).tolist(), batch["x"].tolist()
        ([2.0, 2.0], [1.0, 1.0])
    """
    known = {} if known is None else known
    if id(data) not in known:
        known[id(data)] = _cloned(data, known)
    return known[id(data)]


def _cloned(data: Any, known: dict[int, Any]) -> Any:
    if isinstance(data, Tensor):
        return data.detach().clone().requires_grad_(data.requires_grad)
    if isinstance(data, np.ndarray):
        return data.copy()
    if isinstance(data, MutableMapping):
        made = copy.copy(data)
        made.update({key: cloned(value, known) for key, value in data.items()})
        return made
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(cloned(value, known) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(cloned(value, known) for value in data)
    return data
