"""What the last save found out about the tensors of a state tree, for the next one.

A training saves the same tensors again and again. Where nothing about them but their bytes has
changed, neither has what is written of them, nor where each of them lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unbroken.capture.text import Json

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Block:
    """What is stored of one or several tensors that share memory.

    Args:
        leaf: The path of the leaf.
        dtype: Its safetensors dtype.
        shape: Its shape in the file.
        number: Which tensor of the tree holds all of it.
    """

    leaf: str
    dtype: str
    shape: tuple[int, ...]
    number: int


@dataclass(frozen=True)
class Known:
    """What is known of tensors with these looks.

    Args:
        looks: The path and the look of each.
        nodes: What the structure says of each.
        blocks: What is stored of them all.
    """

    looks: Sequence[tuple[str, tuple[Any, ...]]]
    nodes: Sequence[Mapping[str, Json]]
    blocks: Sequence[Block]


class TensorMemo:
    """Remembers what is known of the tensors that were seen last; holds none of them."""

    def __init__(self) -> None:
        self.known: Known | None = None

    def recall(self, looks: Sequence[tuple[str, tuple[Any, ...]]]) -> Known | None:
        """Return what is known of tensors that look so, in this order."""
        known = self.known
        return known if known is not None and known.looks == looks else None


def looks_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, tuple[Any, ...]]]:
    """Return, with their paths, all of tensors that their nodes and places depend on."""
    return [(path, _look(tensor)) for path, tensor in tensors]


def _look(tensor: torch.Tensor) -> tuple[Any, ...]:
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
        return (object(),)  # equal to no other: such a tensor is looked at closely, and refused
    return (
        type(tensor),
        tensor.dtype,
        tensor.device,
        tensor.shape,
        tensor.stride(),
        tensor.data_ptr(),
        tensor.requires_grad,
        tensor.grad_fn is None,
        tensor.is_conj(),
        tensor.is_neg(),
        getattr(tensor, "_is_buffer", False),
        getattr(tensor, "persistent", True),
    )
