"""Tensors of a state tree -> leaves: which memory is stored, in which file, and seen how.

Tensors that overlap in memory are stored as one block, so that they share memory again after a
load; each is described as a view of its block. All others are stored one by one. Nothing is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from unbroken.capture.tensors import (
    QUANTIZED,
    SAFETENSORS_DTYPES,
    Chunks,
    contiguous_stride,
    dtype_name,
    flat_bytes,
    is_dense,
    is_sharded,
    memory_view,
    part_of,
    raw,
    same_layout,
)
from unbroken.errors import CaptureError
from unbroken.store.format.safetensors_file import Copied
from unbroken.store.format.typed_json import TAG, Json

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
"""The classes of tensors whose memory is all there is to them."""

FileOf = Callable[[str], tuple[str, str]]
"""Gives for the path of a leaf the file that it goes into and its name there."""

_CHUNK = 16 * 2**20
_ALIGNMENT = 16
_OTHER_FILE = "state.safetensors"
_RESERVED_NAMES = {"buffers", "gradients", "state"}
_FEW = 16  # tensors that may have changed: random generators give new ones each time


class TensorLeaf(NamedTuple):  # thousands are made while a training waits: fast to make
    """The bytes of one tensor, to be stored; refers to the live memory and copies nothing.

    Args:
        path: Unique in the checkpoint, such as "optimizer.state.wte.weight.exp_avg".
        file: The file that it goes into.
        name: Its key in that file.
        dtype: Its safetensors dtype; "U8" for bytes of any other kind.
        shape: Its shape in the file.
        tensor: The live tensor whose elements, in C order, are the bytes.
        sharded: The tensor that several ranks hold, if this is what one of them has of it.
        offsets: Of a part of it that is not all of it, where it starts there, by dimension.
        global_shape: Of such a part, the shape of the whole.
        copied: The copy that is stored, if there is one, whatever becomes of the live tensor.
    """

    path: str
    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    sharded: torch.Tensor | None = None
    offsets: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None
    copied: Copied | None = None

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.tensor.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in C order, at most 16 MiB at a time."""
        if self.copied is not None:
            end = self.copied.start + self.nbytes
            for start in range(self.copied.start, end, _CHUNK):
                yield self.copied.memory[start : min(start + _CHUNK, end)]
            return
        flat = flat_bytes(raw(self.tensor).contiguous())
        for start in range(0, flat.numel(), _CHUNK):
            yield memory_view(flat[start : start + _CHUNK].cpu())


def stored_as(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the safetensors dtype and shape under which such a tensor is stored."""
    if dtype in SAFETENSORS_DTYPES:
        return SAFETENSORS_DTYPES[dtype], shape
    count = dtype.itemsize
    for size in shape:
        count *= size
    return "U8", (count,)


def file_layout(own_files: Mapping[str, str]) -> FileOf:
    """Return the rule that gives each leaf its file and its name there.

    Args:
        own_files: For each object with a file of its own, that file: {"ema": "ema.safetensors"}.
            Leaves of such an object stand there under their own names, so that a model's file
            is what `from_pretrained` expects. Buffers that are not persistent go to
            "buffers.safetensors", gradients to "gradients.safetensors", all else to
            "state.safetensors", each under its whole path.

    Example:
        >>> file_of = file_layout({"ema": "ema.safetensors"})
        >>> file_of("ema.module.wte.weight")
        ('ema.safetensors', 'module.wte.weight')
        >>> file_of("ema:buffers.module.mask")
        ('buffers.safetensors', 'ema:buffers.module.mask')
    """
    return _FileLayout({**own_files})


@dataclass(frozen=True)
class _FileLayout:
    """The rule; equal ones give every leaf the same file."""

    own_files: Mapping[str, str]

    def __call__(self, path: str) -> tuple[str, str]:
        head, _, name = path.partition(".")
        owner, _, fact = head.partition(":")
        if fact == "buffers":
            return "buffers.safetensors", path
        if owner == "gradients":
            return "gradients.safetensors", path
        if owner not in self.own_files:
            return _OTHER_FILE, path
        plain = name != "" and not fact and name != "__metadata__"
        return (self.own_files[owner], name) if plain else (_OTHER_FILE, path)


def own_file(name: str) -> str | None:
    """Return the file of its own for an object of this name, None where the name cannot be one."""
    safe = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return f"{name}.safetensors" if safe and name not in _RESERVED_NAMES else None


file_of = file_layout({"model": "model.safetensors", "optimizer": "optimizer.safetensors"})
"""The rule for one object called "model" and one called "optimizer"."""


# Which tensors can be stored, and what a tensor is besides its memory.


def check_tensor(value: torch.Tensor, path: str) -> None:
    """Raise unless the tensor is one whose memory is all there is to it, or a sharded one."""
    if type(value) not in PLAIN_TENSORS and not is_sharded(value):
        raise CaptureError(
            path,
            "is a tensor subclass, which cannot be stored",
            found=f"{type(value).__module__}.{type(value).__qualname__}",
            hint="give plain tensors, or a class with __tensor_flatten__ and __tensor_unflatten__",
        )
    if value.is_nested or value.layout != torch.strided or value.device.type == "meta":
        found = "a nested tensor" if value.is_nested else f"{value.layout} on {value.device}"
        hint = "use dense tensors with data: to_dense(), to_padded_tensor(), to_empty()"
        raise CaptureError(path, "cannot be stored", found=found, hint=hint)
    check_graph(value, path)
    if value.is_quantized and value.dtype not in QUANTIZED:
        raise CaptureError(path, "cannot be stored", found=f"a tensor of {value.dtype}")


def check_graph(value: torch.Tensor, path: str) -> None:
    """Raise if the tensor is the result of operations that gradients may flow through."""
    if value.grad_fn is not None:
        hint = "store its value with detach()"
        raise CaptureError(path, "is part of an autograd graph", found=value.grad_fn, hint=hint)


def physical(value: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor as it is, without lazy conjugation and negation."""
    value = value.detach()
    value = torch._neg_view(value) if value.is_neg() else value  # noqa: SLF001 (no public name)
    return value.conj() if value.is_conj() else value


def describe_flags(value: torch.Tensor) -> dict[str, Json]:
    """Return what a tensor is besides its memory; nothing that is as usual."""
    flags: dict[str, Json] = {}
    if isinstance(value, torch.nn.Parameter):
        flags["role"] = "parameter"
    elif getattr(value, "_is_buffer", False):
        persistent = getattr(value, "persistent", True)
        flags["role"] = "buffer" if persistent else "non-persistent buffer"
    if value.device.type != "cpu":
        flags["device"] = str(value.device)
    marks = {"requires_grad": value.requires_grad, "conj": value.is_conj(), "neg": value.is_neg()}
    return {**flags, **{key: True for key, on in marks.items() if on}}


# Where a tensor lies in memory, and which tensors share it.


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
        """Whether the elements fill one block of memory, each address once."""
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
        """Read layout and addresses of a tensor."""
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
    """Return `tensor` with each expanded dimension narrowed to one element."""
    for dimension, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _each_place_once(layout: TensorLayout) -> bool:
    """Return whether no two elements share memory (sufficient condition: nested strides)."""
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


def describe_placement(where: Placement) -> dict[str, Json]:
    """Return where a tensor lies; nothing that is as usual."""
    node: dict[str, Json] = {"leaf": where.leaf, **_describe_layout(where.view)}
    if where.offset:
        node["offset"] = where.offset
    if where.base != where.view:
        node["base"] = _describe_layout(where.base)
    return node


def _describe_layout(layout: TensorLayout) -> dict[str, Json]:
    node: dict[str, Json] = {"dtype": dtype_name(layout.dtype), "shape": [*layout.shape]}
    if layout.stride != contiguous_stride(layout.shape):
        node["stride"] = [*layout.stride]
    return node


# What the last save found out: where nothing about a tensor but its bytes has changed, neither
# has what is written of it, nor where it lies.


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
    if type(tensor) not in PLAIN_TENSORS or tensor.layout is not torch.strided or tensor.is_nested:
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


# The leaves of one tree.


class LeafCollector:
    """Collects the leaves of a tree; tensors are placed when all of them are known.

    `memo` is what an earlier save found out: it makes this one faster.
    """

    def __init__(self, file_of: FileOf, memo: TensorMemo) -> None:
        self.leaves: list[TensorLeaf] = []
        self._file_of, self._files = file_of, memo.files(file_of)
        self._memo = memo
        self._paths: set[str] = set()
        self._names: dict[tuple[str, str], str] = {}
        self._tensors: list[tuple[str, torch.Tensor]] = []
        self._nodes: list[dict[str, Json]] = []
        self._chunks: Chunks = {}

    def add_tensor(self, value: torch.Tensor, path: str) -> dict[str, Json]:
        """Return the node of a tensor; `finish` completes it."""
        if is_sharded(value):
            return self._add_sharded(value, path)
        node: dict[str, Json] = {TAG: "tensor"}
        self._tensors.append((self._unique(path), value))
        self._nodes.append(node)
        return node

    def _add_sharded(self, value: DTensor, path: str) -> dict[str, Json]:
        """Describe the whole tensor, and store the part of it that is here."""
        check_tensor(value, path)
        part = part_of(value, path, self._chunks)
        check_tensor(part.tensor, path)
        dtype, shape = stored_as(value.dtype, part.shape)
        path = self._unique(path)
        box = (None, None) if part.is_whole else (part.offsets, part.global_shape)
        self._add(path, physical(part.tensor), dtype, shape, value, *box)
        layout = {"dtype": dtype_name(value.dtype), "shape": [*part.global_shape]}
        return {TAG: "tensor", **describe_flags(value), "leaf": path, **layout}

    def add_bytes(self, path: str, memory: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> str:
        """Add a leaf that is no tensor of the tree; return its path."""
        path = self._unique(path)
        self._add(path, memory, dtype, shape)
        return path

    def check(self) -> None:
        """Raise if a tensor cannot be stored."""
        for path, tensor in self._tensors:
            check_tensor(tensor, path)

    def finish(self) -> None:
        """Decide which memory is stored, and complete the tensors' nodes."""
        signatures = signatures_of(self._tensors)
        known = self._memo.known = self._cached(signatures)
        if known is None:
            self._place_tensors(signatures)
            return
        for node, same in zip(self._nodes, known.nodes, strict=True):
            node.update(same)
        for block in known.blocks:
            tensor = physical(self._tensors[block.number][1])
            self._add(block.leaf, tensor, block.dtype, block.shape)

    def _cached(self, signatures: list[Signature]) -> CacheEntry | None:
        """Return the cached description of the tensors; None where all must be encoded again."""
        known = self._memo.known
        changed = None if known is None else known.changed(signatures)
        if known is None or not changed:
            return known if changed == [] else None
        refs = {number: self._ref_of(*self._tensors[number]) for number in changed}
        placements = {number: resolve_aliases([ref])[0] for number, ref in refs.items()}
        if any(where.block is not refs[number].tensor for number, where in placements.items()):
            return None
        nodes = {number: self._describe(number, where) for number, where in placements.items()}
        spans = {number: ref.span for number, ref in refs.items()}
        blocks = {number: _block(where, number) for number, where in placements.items()}
        return known.with_these(signatures, nodes, spans, blocks)

    def _place_tensors(self, signatures: list[Signature]) -> None:
        refs = [self._ref_of(path, tensor) for path, tensor in self._tensors]
        numbers = {id(ref.tensor): number for number, ref in enumerate(refs)}
        placements = resolve_aliases(refs)
        blocks: dict[str, Block] = {}
        for number, (node, where) in enumerate(zip(self._nodes, placements, strict=True)):
            node |= self._describe(number, where)
            if where.leaf not in blocks:  # -1: no tensor of the tree is all of it
                block = _block(where, numbers.get(id(where.block), -1))
                blocks[where.leaf] = block
                self._add(where.leaf, where.block, block.dtype, block.shape)
        if all(block.number >= 0 for block in blocks.values()):
            count = Counter(where.leaf for where in placements)
            alone = frozenset(n for n, where in enumerate(placements) if count[where.leaf] == 1)
            spans = [ref.span for ref in refs]
            self._memo.known = CacheEntry(signatures, self._nodes, spans, [*blocks.values()], alone)

    def _ref_of(self, path: str, tensor: torch.Tensor) -> TensorRef:
        check_tensor(tensor, path)
        return TensorRef.of(path, physical(tensor))

    def _describe(self, number: int, where: Placement) -> dict[str, Json]:
        return {**describe_flags(self._tensors[number][1]), **describe_placement(where)}

    def _add(
        self,
        path: str,
        tensor: torch.Tensor,
        dtype: str,
        shape: tuple[int, ...],
        sharded: torch.Tensor | None = None,
        offsets: tuple[int, ...] | None = None,
        global_shape: tuple[int, ...] | None = None,
    ) -> None:
        where = self._files.get(path)
        if where is None:
            where = self._files[path] = self._file_of(path)
        file, name = where
        other = self._names.setdefault((file, name), path)
        if other != path:
            raise CaptureError(path, f"has the place of {other}", found=f"{name} in {file}")
        leaf = TensorLeaf(path, file, name, dtype, shape, tensor, sharded, offsets, global_shape)
        self.leaves.append(leaf)

    def _unique(self, path: str) -> str:
        """Return `path`, or `path~2`, `path~3`, ... where another leaf has it already."""
        path = path or "value"
        candidate, count = path, 1
        while candidate in self._paths:
            count += 1
            candidate = f"{path}~{count}"
        self._paths.add(candidate)
        return candidate


def _block(where: Placement, number: int) -> Block:
    dtype, shape = stored_as(where.base.dtype, where.base.shape)
    return Block(where.leaf, dtype, shape, number)
