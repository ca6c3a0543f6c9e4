"""Find tensors that share memory: store each block once, and describe each tensor as a view.

Tensors that overlap in memory are stored as one block, so that they share memory again after a
load. All others are stored one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from unbroken.capture.dtypes import contiguous_stride, is_dense, same_layout
from unbroken.errors import CaptureError

_ALIGNMENT = 16


@dataclass(frozen=True)
class TensorLayout:
    """How elements lie in memory: dtype, shape and strides in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorLayout:
        """Return the layout of `tensor`."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride())

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def extent(self) -> int:
        """Number of bytes from the first element to the end of the last one."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether the elements fill one block of memory, each place once."""
        return is_dense(self.shape, self.stride)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        return same_layout(self.shape, self.stride, contiguous_stride(self.shape))


@dataclass(frozen=True)
class TensorRef:
    """A tensor of the tree, its layout and addresses read once: asking a tensor is slow.

    The tensor is neither a conjugate nor a negative view. `start` is the address of its first
    element, `end` the address after its last one.
    """

    path: str
    tensor: torch.Tensor
    layout: TensorLayout
    device: str
    start: int
    end: int

    @classmethod
    def of(cls, path: str, tensor: torch.Tensor) -> TensorRef:
        """Look at a tensor."""
        layout, start = TensorLayout.of(tensor), tensor.data_ptr()
        extent = tensor.nbytes if tensor.is_contiguous() else layout.extent
        device = "cpu" if tensor.is_cpu else str(tensor.device)
        return cls(path, tensor, layout, device, start, start + extent)

    @property
    def span(self) -> tuple[str, int, int]:
        """Where it lies."""
        return self.device, self.start, self.end


@dataclass(frozen=True)
class Placement:
    """A tensor as a view on the block that is stored under the path `leaf`.

    The elements of `block` are stored in C order. `base` is the layout of the block, `view` that
    of the tensor, `offset` the bytes between their first elements.
    """

    leaf: str
    block: torch.Tensor
    base: TensorLayout
    view: TensorLayout
    offset: int = 0


def resolve_aliases(tensors: Sequence[TensorRef]) -> list[Placement]:
    """Return the placement of each tensor, in the order given."""
    placed: dict[int, Placement] = {}
    for group in _overlapping(tensors):
        members = [tensors[index] for index in group]
        placed.update(zip(group, _place_group(members), strict=True))
    return [placed[index] for index in range(len(tensors))]


def _overlapping(tensors: Sequence[TensorRef]) -> Iterator[list[int]]:
    """Yield the indices of tensors that overlap, directly or over others, in order of the tree."""
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i].device, tensors[i].start))
    for _, indices in groupby(order, key=lambda i: tensors[i].device):
        yield from (sorted(run) for run in _runs(tensors, indices))


def _runs(tensors: Sequence[TensorRef], indices: Iterable[int]) -> Iterator[list[int]]:
    run: list[int] = []
    end = 0
    for index in indices:
        seen = tensors[index]
        if seen.start == seen.end:
            yield [index]
            continue
        if run and seen.start >= end:
            yield run
            run = []
        end = max(end, seen.end) if run else seen.end
        run.append(index)
    if run:
        yield run


def _place_group(members: Sequence[TensorRef]) -> list[Placement]:
    first = members[0]
    if len({(member.layout, member.start) for member in members}) == 1:
        return [_place_separately(first)] * len(members)
    base = _covering(members)
    if base is None:
        return _place_on_memory(members)
    return [
        Placement(
            base.path,
            base.tensor,
            base.layout,
            m.layout,
            m.start - base.start,
        )
        for m in members
    ]


def _place_separately(seen: TensorRef) -> Placement:
    layout = seen.layout
    if seen.tensor.is_contiguous() or layout.is_dense:
        return Placement(seen.path, seen.tensor, layout, layout)
    narrow = _without_repeats(seen.tensor)
    if not _each_place_once(TensorLayout.of(narrow)):
        return _place_on_memory([seen])[0]
    base = TensorLayout(layout.dtype, tuple(narrow.shape), contiguous_stride(tuple(narrow.shape)))
    stride = tuple(
        0 if step == 0 and size > 1 else new
        for size, step, new in zip(layout.shape, layout.stride, base.stride, strict=True)
    )
    return Placement(seen.path, narrow, base, TensorLayout(layout.dtype, layout.shape, stride))


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with each expanded dimension cut to one element."""
    for dimension, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _each_place_once(layout: TensorLayout) -> bool:
    """Tell whether no two elements share memory (sufficient condition: nested strides)."""
    reach = 0
    for step, size in sorted(zip(layout.stride, layout.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return False
            reach += (size - 1) * step
    return True


def _covering(members: Sequence[TensorRef]) -> TensorRef | None:
    """Return the first tensor that fills all the memory of the group, if the others fit on it."""
    start, end = min(m.start for m in members), max(m.end for m in members)
    if any((member.start - start) % member.tensor.element_size() for member in members):
        return None
    for member in members:
        if (member.start, member.end) == (start, end) and member.layout.is_dense:
            return member
    return None


def _place_on_memory(members: Sequence[TensorRef]) -> list[Placement]:
    """Place tensors on the raw memory that they span together."""
    storage = members[0].tensor.untyped_storage()
    if len({member.tensor.untyped_storage().data_ptr() for member in members}) > 1:
        raise CaptureError(
            members[-1].path,
            f"overlaps the memory of {members[0].path}, but the two belong to different storages",
            hint="clone() one of the two tensors",
        )
    start = min(member.start for member in members) - storage.data_ptr()
    start -= start % _ALIGNMENT
    end = max(member.end for member in members) - storage.data_ptr()
    memory = torch.empty(0, dtype=torch.uint8, device=storage.device)
    memory.set_(storage, start, (end - start,), (1,))
    leaf = f"{members[0].path}~memory"
    origin = memory.data_ptr()
    return [
        Placement(leaf, memory, TensorLayout.of(memory), m.layout, m.start - origin)
        for m in members
    ]
