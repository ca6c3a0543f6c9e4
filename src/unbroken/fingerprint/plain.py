"""Plain values: what of an object can stand in a manifest and be compared with `==`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""A JSON value."""

NOT_COMPARED = "not compared: "
"""What the value of a fact begins with that could not be taken; why not follows."""

_MAX_ITEMS = 64
_MAX_DEPTH = 8


def plain_items(items: Mapping[str, object]) -> dict[str, Plain]:
    """Return the items whose values are plain, as JSON has them.

    Numbers that JSON does not know (inf, nan) become their names; tuples lists; dtypes,
    devices and enums their names; NumPy's and torch's single numbers numbers.

    Example:
        >>> plain_items({"betas": (0.9, 0.999), "limit": float("inf"), "model": object()})
        {'betas': [0.9, 0.999], 'limit': 'inf'}
    """
    found = {name: _plain(value) for name, value in items.items()}
    return {name: value for name, value in found.items() if value is not ...}


def plain_or_text(value: object) -> Plain:
    """Return a value as JSON has it, or else as text.

    Example:
        >>> plain_or_text({1}), plain_or_text(0.5)
        ('{1}', 0.5)
    """
    found: Plain = plain_items({"value": value}).get("value", str(value))
    return found


def plain_attributes(thing: object) -> dict[str, Plain]:
    """Return the public attributes of an object that are plain values, sorted by name.

    Example:
        >>> class Crop:
        ...     def __init__(self):
        ...         self.size, self.fill, self._cache, self.source = 24, 0.5, 1, object()
        >>> plain_attributes(Crop())
        {'fill': 0.5, 'size': 24}
    """
    items = sorted(getattr(thing, "__dict__", {}).items())
    return plain_items({name: value for name, value in items if not name.startswith("_")})


def _plain(value: object, depth: int = 0) -> Any:
    """Return a value as JSON has it, or Ellipsis."""
    if value is None or (isinstance(value, bool | int | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, np.generic | torch.Tensor):
        has_number = value.ndim == 0 and not getattr(value, "is_meta", False)
        return _plain(value.item()) if has_number else ...
    if isinstance(value, Enum | torch.dtype | torch.device):
        return str(value)
    if not isinstance(value, list | tuple | Mapping) or len(value) > _MAX_ITEMS:
        return ...
    if depth > _MAX_DEPTH:  # a list may hold itself
        return ...
    if isinstance(value, list | tuple):
        return _all([_plain(item, depth + 1) for item in value])
    if all(isinstance(key, str) for key in value):
        items = _all([_plain(item, depth + 1) for item in value.values()])
        return items if items is ... else dict(zip(value, items, strict=True))
    return ...


def _all(items: list[Any]) -> Any:
    return ... if ... in items else items
