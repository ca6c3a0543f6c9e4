"""Boxes: the part of a tensor that a shard holds, or that a reader wants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple


@dataclass(frozen=True)
class Box:
    """A part of a tensor.

    Attributes:
        offsets: Where it starts, in elements, by dimension.
        shape: How far it goes, by dimension.

    Example:
        >>> Box((4, 0), (2, 3)).overlap(Box((5, 1), (9, 9)))
        Box(offsets=(5, 1), shape=(1, 2))
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box of a whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """How many elements are in it."""
        return math.prod(self.shape)

    @property
    def ends(self) -> tuple[int, ...]:
        """Where it ends, by dimension."""
        return tuple(at + size for at, size in zip(self.offsets, self.shape, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """Return what is in both; None if nothing is."""
        starts = tuple(map(max, zip(self.offsets, other.offsets, strict=True)))
        ends = tuple(map(min, zip(self.ends, other.ends, strict=True)))
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return None if any(size <= 0 for size in sizes) else Box(starts, sizes)


class Run(NamedTuple):
    """Elements that lie together in two boxes: where in each, and how many."""

    source: int
    target: int
    length: int


def runs(source: Box, target: Box) -> Iterator[Run]:
    """Yield what to copy from one box to another, each in C order, by place in the source.

    Example:
        >>> list(runs(Box((0, 0), (2, 2)), Box((0, 1), (2, 3))))
        [Run(source=1, target=0, length=1), Run(source=3, target=3, length=1)]
        >>> list(runs(Box((2, 0), (2, 3)), Box((0, 0), (9, 3))))
        [Run(source=0, target=6, length=6)]
    """
    both = source.overlap(target)
    if both is None:
        return
    outer = _outer_dimensions(both, source, target)
    length = math.prod(both.shape[outer:])
    first = [_index(box, both.offsets) for box in (source, target)]
    strides = [_strides(box.shape)[:outer] for box in (source, target)]
    for place in product(*map(range, both.shape[:outer])):
        at = [start + _dot(place, steps) for start, steps in zip(first, strides, strict=True)]
        yield Run(at[0], at[1], length)


def _outer_dimensions(both: Box, source: Box, target: Box) -> int:
    """Return how many leading dimensions have to be walked: the rest lies together."""
    outer = max(len(both.shape) - 1, 0)
    while outer and both.shape[outer] == source.shape[outer] == target.shape[outer]:
        outer -= 1
    return outer


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _index(box: Box, place: Sequence[int]) -> int:
    inside = [at - start for at, start in zip(place, box.offsets, strict=True)]
    return _dot(inside, _strides(box.shape))


def _dot(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(one, other, strict=True))


def fill(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Tell whether the boxes cover a tensor of this shape, each element once.

    Example:
        >>> fill([Box((0,), (2,)), Box((2,), (1,))], (3,)), fill([Box((0,), (2,))], (3,))
        (True, False)
    """
    whole = Box.whole(shape)
    if any(len(box.offsets) != len(shape) or len(box.shape) != len(shape) for box in boxes):
        return False
    inside = all(box.overlap(whole) == box for box in boxes)
    return inside and sum(box.numel for box in boxes) == whole.numel and not _collide(boxes)


def _collide(boxes: Sequence[Box]) -> bool:
    """Tell whether two boxes overlap; only those that may are compared."""
    if len(boxes) < 2:
        return False
    axis = max(range(len(boxes[0].shape)), key=lambda d: len({box.offsets[d] for box in boxes}))
    ordered = sorted(boxes, key=lambda box: (box.offsets[axis], box.offsets))
    active: list[Box] = []
    for box in ordered:
        active = [other for other in active if other.ends[axis] > box.offsets[axis]]
        if any(box.overlap(other) for other in active):
            return True
        active.append(box)
    return False
