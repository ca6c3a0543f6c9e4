"""Cache between saves: how the tensors of a state tree are described and where they are stored.

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

_FEW = 16  # tensors that may have changed: random generators give new ones each time
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Block:
    """One stored leaf: the memory of one tensor, or of several that share it.

    `number` is the tensor of the tree that covers all of it; `dtype` and `shape` are those in the
    file.
    """

    leaf: str
    dtype: str
    shape: tuple[int, ...]
    number: int


Signature = tuple[str, tuple[Any, ...]]
"""A tensor's path, and everything of it that its node and its block depend on, except bytes."""

AddressRange = tuple[str, int, int]
"""The memory of a tensor: device, first address, address after its last byte."""


@dataclass(frozen=True)
class CacheEntry:
    """The result of the last encoding, valid for tensors with these signatures.

    For each tensor, `nodes` has its node in the structure and `spans` its address range. `blocks`
    are the stored leaves; `alone` are the numbers of tensors that share memory with no other.
    """

    signatures: Sequence[Signature]
    nodes: Sequence[Mapping[str, Json]]
    spans: Sequence[AddressRange]
    blocks: Sequence[Block]
    alone: frozenset[int]

    def changed(self, signatures: Sequence[Signature]) -> list[int] | None:
        """Return which tensors changed; None where all must be encoded again."""
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
        """Return a copy with the changed tensors replaced; None if one now shares memory.

        `signatures` are those of all tensors, the rest those of the changed ones, by number.
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
    """Keeps the last `CacheEntry`; it holds no tensor alive."""

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
    """Return the signatures of tensors at these paths."""
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
