"""Giving objects their state back, and asking them whether they took all of it.

A `load_state_dict` of the user's own may forget a part. Nothing else would tell, until the steps
after a resume differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unbroken.capture.tensors import is_sharded

_LIBRARIES = (
    *("unbroken", "torch", "torchdata", "torchmetrics", "transformers", "accelerate", "datasets"),
    *("lightning", "pytorch_lightning", "peft"),
)
_NOTHING = "nothing"
_SAMPLE = 1 << 16  # values of a tensor that are compared


@dataclass(frozen=True)
class NotTakenBack:
    """A part of a state that an object does not have after it was given it.

    Attributes:
        path: Where it stands in the state; begins with a dot.
        stored: What was given.
        now: What the object says that it has.
    """

    path: str
    stored: Any
    now: Any


def give_back(
    owner: object, state: Any, give: Callable[[Any], object], ask: Callable[[], Any]
) -> list[NotTakenBack]:
    """Give an object its state; return what it does not have then, if its class is the user's own.

    Of large tensors a sample is compared. What differs whenever it is asked (a clock) is left out.

    Args:
        owner: The object.
        state: The state.
        give: Gives it.
        ask: Returns the state that it has.

    Example:
        >>> class Meter:
        ...     count = 0
        >>> meter = Meter()
        >>> meter.__class__.__module__ = "train"
        >>> give_back(meter, {"count": 3}, lambda state: None, lambda: {"count": meter.count})
        [NotTakenBack(path='.count', stored=3, now=0)]
    """
    if type(owner).__module__.partition(".")[0] in _LIBRARIES:
        give(state)
        return []
    kept = _sampled(state)  # the object may go on with what it is given
    give(state)
    now, again = _sampled(ask()), _sampled(ask())
    moving = {one.path for one in _not_equal(now, again)}
    return [one for one in _not_equal(kept, now) if one.path not in moving]


def _not_equal(stored: Any, now: Any, path: str = "") -> Iterator[NotTakenBack]:
    """Yield where two states differ, as far as their values can be compared."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in {**stored, **now}:
            inner = f"{path}.{key}"
            yield from _not_equal(stored.get(key, _NOTHING), now.get(key, _NOTHING), inner)
    elif isinstance(stored, list) and isinstance(now, list):
        if len(stored) != len(now):
            yield NotTakenBack(path, f"{len(stored)} values", f"{len(now)} values")
            return
        for index, (one, other) in enumerate(zip(stored, now, strict=True)):
            yield from _not_equal(one, other, f"{path}.{index}")
    elif not _is_equal(stored, now):
        yield NotTakenBack(path, stored, now)


@dataclass(frozen=True)
class _Sample:
    """What is compared of an array."""

    kind: str
    values: bytes

    def __str__(self) -> str:
        return self.kind


_COMPARED = (bool, int, float, complex, str, bytes, _Sample, list, dict)


def _is_equal(stored: Any, now: Any) -> bool:
    """Return whether two values are the same; of what nobody can compare, that they are."""
    if not all(one is None or isinstance(one, _COMPARED) for one in (stored, now)):
        return True
    return repr(stored) == repr(now) or bool(stored == now)


def _sampled(tree: Any) -> Any:
    """Return a copy of a state, with tuples as lists, and samples in place of arrays."""
    if isinstance(tree, Mapping):
        return {key: _sampled(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_sampled(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        return _Sample(f"{tree.dtype} of shape {tuple(tree.shape)}", _values_of(tree))
    if isinstance(tree, np.ndarray):
        values = tree.reshape(-1)[:: max(1, tree.size // _SAMPLE)]
        return _Sample(f"{tree.dtype} of shape {tree.shape}", values.tobytes())
    return tree


def _values_of(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta or tensor.layout is not torch.strided or is_sharded(tensor):
        return b""
    values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLE)]
    return bytes(values.cpu().contiguous().view(torch.uint8).numpy().data)
