"""What the last save found out about the tensors of a state tree, for the next one.

A training saves the same tensors again and again. Where nothing about them but their bytes has
changed, neither has what is written of them, nor where each of them lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unbroken.capture.codec.leaves import FileOf
from unbroken.capture.codec.typed_json import Json

_FEW = 16  # tensors that may look otherwise: random generators give new ones each time
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


Signature = tuple[str, tuple[Any, ...]]
"""A tensor's path, and all else of it that its node and its place depend on."""

AddressRange = tuple[str, int, int]
"""Where a tensor lies: its device, its first address, and that after its last byte."""


@dataclass(frozen=True)
class CacheEntry:
    """What is known of tensors with these looks.

    Args:
        signatures: The look of each.
        nodes: What the structure says of each.
        spans: Where each lies.
        blocks: What is stored of them all.
        alone: The numbers of those that share memory with no other.
    """

    signatures: Sequence[Signature]
    nodes: Sequence[Mapping[str, Json]]
    spans: Sequence[AddressRange]
    blocks: Sequence[Block]
    alone: frozenset[int]

    def changed(self, signatures: Sequence[Signature]) -> list[int] | None:
        """Return which tensors look otherwise; None where all have to be looked at again."""
        if len(signatures) != len(self.signatures):
            return None
        pairs = zip(self.signatures, signatures, strict=True)
        numbers = [number for number, (one, other) in enumerate(pairs) if one != other]
        same = all(self.signatures[n][0] == signatures[n][0] and n in self.alone for n in numbers)
        return numbers if same and len(numbers) <= _FEW else None

    def with_these(
        self,
        signatures: Sequence[Signature],
        nodes: Mapping[int, Mapping[str, Json]],
        spans: Mapping[int, AddressRange],
        blocks: Mapping[int, Block],
    ) -> CacheEntry | None:
        """Return the same with some tensors anew; None if one of these is not alone any more.

        Args:
            signatures: Of all tensors.
            nodes: Of those that have changed, by number.
            spans: Of those that have changed.
            blocks: Of those that have changed.
        """
        everywhere = [spans.get(number, span) for number, span in enumerate(self.spans)]
        if any(_meets_another(everywhere, number) for number in spans):
            return None
        return CacheEntry(
            signatures,
            [nodes.get(number, node) for number, node in enumerate(self.nodes)],
            everywhere,
            [blocks.get(block.number, block) for block in self.blocks],
            self.alone,
        )


def _meets_another(spans: Sequence[AddressRange], number: int) -> bool:
    device, start, end = spans[number]
    return any(
        start < its_end and its_start < end and device == its_device and other != number
        for other, (its_device, its_start, its_end) in enumerate(spans)
    )


class TensorMemo:
    """Remembers what is known of the tensors that were seen last; holds none of them."""

    def __init__(self) -> None:
        self.known: CacheEntry | None = None
        self._rule: FileOf | None = None
        self._files: dict[str, tuple[str, str]] = {}

    def files(self, rule: FileOf) -> dict[str, tuple[str, str]]:
        """Return what this rule, or one that is equal to it, gave for the paths of leaves."""
        if rule != self._rule:
            self._rule, self._files = rule, {}
        return self._files


def signatures_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Signature]:
    """Return how tensors at these paths look."""
    return [(path, _signature_of(tensor)) for path, tensor in tensors]


def _signature_of(tensor: torch.Tensor) -> tuple[Any, ...]:
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
