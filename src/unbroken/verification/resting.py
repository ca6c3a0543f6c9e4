"""Memory that nothing writes between two moments: whether it changed, where, and by which bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from unbroken.capture import byte_view
from unbroken.distributed.dtensors import is_dtensor, local_part
from unbroken.recorder.digests import hash_of

BLOCK = 16 << 10
"""Bytes that have a digest of their own: a flipped bit is looked for in so many."""

_DIGEST = 8
_MOST_SEARCHED = 4


@dataclass(frozen=True)
class MemoryChange:
    """Bytes of a tensor that are not what they were, though no operation of PyTorch wrote them.

    Attributes:
        name: Of the tensor.
        first: The first byte of the first block that differs.
        end: The byte after the last such block.
        flip: The element, its value before and after, where one bit of it alone differs.
    """

    name: str
    first: int
    end: int
    flip: str | None

    def __str__(self) -> str:
        where = f"bytes {self.first} to {self.end - 1} of {self.name}"
        return where if self.flip is None else f"{self.name}{self.flip}"


@dataclass(frozen=True)
class _Digests:
    """A tensor at one moment: who it is, how often it was written, and what it held."""

    address: int
    writes: int
    blocks: bytes


class RestingTensors:
    """The digests of tensors at one moment.

    What operations of PyTorch write meanwhile, or another tensor in the place of one, is no change
    here: each such operation counts up the version of its tensor. Writes through `.data` do not.

    Args:
        tensors: By name.

    Example:
        >>> weight = torch.ones(3)
        >>> resting = RestingTensors({"weight": weight})
        >>> weight.numpy().view("uint8")[5] ^= 1
        >>> [str(change) for change in resting.changes({"weight": weight})]
        ['weight[1], bit 8: 1.0 became 1.000030517578125']
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._known = {name: _digests(part) for name, part in _readable(tensors)}

    def changes(self, tensors: Mapping[str, Tensor]) -> list[MemoryChange]:
        """Return what changed and was not written."""
        return [*self._changes(tensors)]

    def _changes(self, tensors: Mapping[str, Tensor]) -> Iterator[MemoryChange]:
        for name, part in _readable(tensors):
            before = self._known.get(name)
            if before is None or (before.address, before.writes) != _written(part):
                continue
            now = _digests(part).blocks
            if now != before.blocks:
                yield _change(name, part, before.blocks, now)


def _readable(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield what this process holds of the tensors that are simply memory."""
    for name, tensor in tensors.items():
        part = local_part(tensor).detach()
        plain = type(part) is Tensor and part.layout is torch.strided
        if plain and not part.is_meta and not part.is_inference() and part.numel():
            yield name, part


def _written(part: Tensor) -> tuple[int, int]:
    return part.data_ptr(), part._version  # noqa: SLF001 (torch has no public name)


def _memory(part: Tensor) -> memoryview:
    return byte_view(part.contiguous().cpu())


def _digests(part: Tensor) -> _Digests:
    memory = _memory(part)
    blocks = [hash_of(memory[at : at + BLOCK]) for at in range(0, len(memory), BLOCK)]
    return _Digests(*_written(part), b"".join(blocks))


def _change(name: str, part: Tensor, before: bytes, now: bytes) -> MemoryChange:
    differing = [
        at // _DIGEST
        for at in range(0, len(now), _DIGEST)
        if now[at : at + _DIGEST] != before[at : at + _DIGEST]
    ]
    memory, flip = _memory(part), None
    if len(differing) <= _MOST_SEARCHED:
        for block in differing:
            held = memory[block * BLOCK : (block + 1) * BLOCK]
            bit = _flipped_bit(held, before[block * _DIGEST : (block + 1) * _DIGEST])
            if bit is not None:
                flip = _in_words(part, memory, block * BLOCK * 8 + bit)
                break
    end = min(len(memory), (differing[-1] + 1) * BLOCK)
    return MemoryChange(name, differing[0] * BLOCK, end, flip)


def _flipped_bit(held: memoryview, digest: bytes) -> int | None:
    """Return the one bit by which a block differs from the one with this digest, if it is one."""
    data = bytearray(held)
    for bit in range(8 * len(data)):
        data[bit >> 3] ^= 1 << (bit & 7)
        if hash_of(data) == digest:
            return bit
        data[bit >> 3] ^= 1 << (bit & 7)
    return None


def _in_words(part: Tensor, memory: memoryview, bit: int) -> str:
    """Return which element a bit is in, and the values of this with and without it."""
    size = part.element_size()
    index, within = divmod(bit, 8 * size)
    now = bytearray(memory[index * size : (index + 1) * size])
    before = bytearray(now)
    before[within >> 3] ^= 1 << (within & 7)
    values = [torch.frombuffer(raw, dtype=part.dtype)[0].item() for raw in (before, now)]
    place = f"[{', '.join(map(str, _place(index, part.shape)))}]" if part.dim() else ""
    return f"{place}, bit {within}: {values[0]} became {values[1]}"


def _place(index: int, shape: torch.Size) -> list[int]:
    place = []
    for at in range(len(shape)):
        below = math.prod(shape[at + 1 :])
        place.append(index // below)
        index %= below
    return place


# Which tensors rest between two steps.


def weights_and_moments(
    parameters: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Tensor]:
    """Return all parameters and the tensors of the optimizer's state, by name.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([weight], momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> list(weights_and_moments({"weight": weight}, optimizer))
        ['weight', 'momentum_buffer of weight']
    """
    return {**parameters, **moments(parameters, optimizer)}


def moments(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the tensors of the optimizer's state, by name."""
    return {
        f"{key} of {name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def counts_of_writes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return where each tensor is and how often it was written, by name; nothing is read."""
    return {
        name: _written(local_part(tensor) if is_dtensor(tensor) else tensor)
        for name, tensor in tensors.items()
        if tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_inference()
    }
