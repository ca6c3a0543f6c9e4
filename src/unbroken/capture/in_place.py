"""State of an optimizer that can be overwritten where it is: filling it takes no new memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unbroken.capture.sharded import is_sharded, same_cut
from unbroken.capture.stored import StoredTensor
from unbroken.capture.tree import children


class StateInPlace:
    """The tensors that an optimizer has as state, before others take their place.

    Memory that is shared, by live tensors or by stored ones, is never overwritten: those that
    share it would no longer be what the checkpoint says.

    Args:
        optimizer: Live, with its state.
        stored: The state that it is going to get.
    """

    def __init__(self, optimizer: Optimizer, stored: Mapping[str, Any]) -> None:
        self._state = dict(optimizer.state)
        self._live: Counter[int] = Counter()
        self._stored: Counter[str] = Counter()
        if not self._state:
            return
        live = [*self._state.values(), *(group["params"] for group in optimizer.param_groups)]
        held = (_held(one) for one in _values_in(live))
        self._live.update(_memory_of(one) for one in held if _has_memory(one))
        leaves = (value for value in _values_in(stored) if isinstance(value, StoredTensor))
        self._stored.update(leaf.path for leaf in leaves)

    def place_for(
        self, value: StoredTensor, parameter: torch.Tensor, key: object
    ) -> torch.Tensor | None:
        """Return the live tensor that may be overwritten with `value`; None: there is none."""
        state = self._state.get(parameter)
        live = state.get(key) if isinstance(state, dict) else None
        held = _held(live)
        if live is None or type(held) is not torch.Tensor or not _has_memory(held):
            return None
        if is_sharded(live) and not same_cut(live, parameter):
            return None
        alone = self._live[_memory_of(held)] == 1 and self._stored[value.path] == 1
        return live if alone and live.device == parameter.device and value.is_like(live) else None


def _values_in(tree: object) -> Iterator[Any]:
    """Yield every value once for each place that it is found in."""
    todo = [tree]
    while todo:
        value = todo.pop()
        yield value
        todo.extend(children(value))


def _held(value: object) -> Any:
    """Return the tensor that a value is on this rank."""
    if not is_sharded(value):
        return value
    with torch.no_grad():
        return value.to_local()


def _has_memory(value: object) -> bool:
    plain = type(value) in (torch.Tensor, nn.Parameter)
    return plain and value.layout == torch.strided  # type: ignore[attr-defined]


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
