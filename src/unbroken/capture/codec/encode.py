"""State tree -> typed JSON and leaves.

Nothing is pickled; what cannot be stored is refused, with its path.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, Flag
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unbroken.capture.codec.encode_cache import (
    Block,
    CacheEntry,
    Signature,
    TensorMemo,
    signatures_of,
)
from unbroken.capture.codec.leaves import FileOf, TensorLeaf, file_of, stored_as
from unbroken.capture.codec.memory_layout import Placement, TensorRef, resolve_aliases
from unbroken.capture.codec.scalars import (
    ENCODE,
    SAFETENSORS_DESCRIPTIONS,
    encode_dtype,
    encode_int,
    encode_numpy,
    is_text,
)
from unbroken.capture.codec.tensors import (
    check_graph,
    check_tensor,
    describe_flags,
    describe_placement,
    physical,
)
from unbroken.capture.codec.typed_json import MAX_DEPTH, TAG, Json, join
from unbroken.capture.dtypes import QUANTIZED, dtype_name
from unbroken.capture.sharded import Chunks, is_sharded, part_of
from unbroken.capture.state_tree import Captured, is_namedtuple
from unbroken.capture.tensor_subclasses import comes_apart, parts_of
from unbroken.errors import CaptureError
from unbroken.stored_names import stored_path

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


FACTORIES: Mapping[str, type | None] = {
    "None": None,
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, bytes)},
    **{kind.__name__: kind for kind in (list, tuple, dict, set, frozenset, OrderedDict, Counter)},
}
"""The default factories of a `defaultdict` that a checkpoint can name."""

_MUTABLE = frozenset(
    (list, dict, OrderedDict, defaultdict, Counter, deque, set, bytearray, np.ndarray)
)
"""What may occur twice in a tree, and is then the same; tensors of any class may, too."""

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_INLINE_BYTES = 1024  # longer byte strings become leaves


@dataclass(frozen=True)
class Encoded:
    """A state tree as JSON and leaves.

    Args:
        structure: Every value that is not a tensor, typed; and where each leaf belongs.
        leaves: The tensors' bytes, by reference to live memory.
    """

    structure: Json
    leaves: tuple[TensorLeaf, ...]


def encode(tree: Any, *, file_of: FileOf = file_of, memo: TensorMemo | None = None) -> Encoded:
    """Turn a state tree into typed JSON and leaves, so that `decode` returns the same tree.

    The same means: the same types, the same bits (NaN payloads, -0.0, every torch and NumPy
    dtype), the order of dicts, the strides of dense tensors, objects that occur twice, and
    tensors that share memory. Tensors are not copied: they must not change until stored.

    Args:
        tree: dict, list, tuple, named tuple, OrderedDict, defaultdict, Counter, deque, set,
            frozenset, of None, bool, int, float, complex, str, bytes, bytearray, enums, torch
            tensors, dtypes, devices, sizes, layouts, memory formats, NumPy arrays, scalars, dtypes.
        file_of: Gives for the path of a leaf its file and its name there.
        memo: What an earlier call found out, which makes this one faster.

    Returns:
        The structure and the leaves.

    Raises:
        CaptureError: A value cannot be stored; the error names its path and its type.

    Example:
        >>> encode({"step": 3, "betas": (0.9, 0.95)}).structure
        {'step': 3, 'betas': {'$': 'tuple', 'items': [0.9, 0.95]}}
    """
    encoder = _Encoder(file_of, memo or TensorMemo())
    structure = encoder.value(tree, "")
    encoder.finish_tensors()
    return Encoded(structure, tuple(encoder.leaves))


def refuse_what_cannot_be_stored(tree: Any) -> None:
    """Raise what `encode` would raise; where the tensors lie in memory is not looked at.

    Args:
        tree: A state tree.

    Raises:
        CaptureError: A value cannot be stored; the error names its path and its type.
    """
    encoder = _Encoder(file_of, TensorMemo())
    encoder.value(tree, "")
    encoder.check_tensors()


class _Encoder:
    """Walks a tree once; tensors are collected, and placed when all of them are known."""

    def __init__(self, file_of: FileOf, memo: TensorMemo) -> None:
        self.leaves: list[TensorLeaf] = []
        self._file_of, self._files = file_of, memo.files(file_of)
        self._memo = memo
        self._paths: set[str] = set()
        self._names: dict[tuple[str, str], str] = {}
        self._seen: dict[int, tuple[int, object]] = {}  # holds the objects, so that ids stay theirs
        self._open: list[int] = []
        self._tensors: list[tuple[str, torch.Tensor]] = []
        self._nodes: list[dict[str, Json]] = []
        self._in_key = False
        self._chunks: Chunks = {}

    def value(self, value: Any, path: str) -> Json:
        """Encode one value of any kind."""
        scalar = ENCODE.get(type(value))
        if scalar is not None:
            return scalar(value)
        if type(value) not in _MUTABLE and not isinstance(value, torch.Tensor):
            return self._immutable(value, path)
        return self._shared(value, path)

    def _shared(self, value: Any, path: str) -> Json:
        """Encode a value that may occur twice: the second time as a reference to the first."""
        if id(value) in self._open:
            raise CaptureError(path, "contains itself", hint="cut the cycle before saving")
        if id(value) in self._seen:
            return {TAG: "same", "as": self._seen[id(value)][0]}
        self._seen[id(value)] = (len(self._seen), value)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        return self._nested(value, path, self._mutable)

    def _nested(self, value: Any, path: str, encode: Callable[[Any, str], Json]) -> Json:
        if len(self._open) >= MAX_DEPTH:
            raise CaptureError(path[:200], f"is nested deeper than {MAX_DEPTH} levels")
        self._open.append(id(value))
        try:
            return encode(value, path)
        finally:
            self._open.pop()

    def _mutable(self, value: Any, path: str) -> Json:
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if isinstance(value, bytearray):
            return self._bytes(value, path, "bytearray")
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, set):
            return {TAG: "set", "items": self._elements(value, path)}
        items = self._items(value, path)
        if isinstance(value, deque):
            return {TAG: "deque", "maxlen": value.maxlen, "items": items}
        return items

    def _immutable(self, value: Any, path: str) -> Json:
        if isinstance(value, Enum):
            return self._enum(value, path)
        if type(value) is tuple or is_namedtuple(value) or type(value) is Captured:
            return self._nested(value, path, self._group)
        if type(value) is frozenset:
            return {TAG: "frozenset", "items": self._nested(value, path, self._elements)}
        if type(value) is bytes:
            return self._bytes(value, path, "bytes")
        if isinstance(value, np.dtype):
            return {TAG: "numpy.dtype", "dtype": encode_dtype(value, path)}
        if isinstance(value, np.generic) and type(value) is value.dtype.type:
            return encode_numpy(value, path)
        raise _unsupported(path, value)

    def _group(self, value: Any, path: str) -> Json:
        if isinstance(value, Captured):
            facts = {key: self.value(fact, f"{path}:{key}") for key, fact in value.facts.items()}
            state = self.value(value.state, path)
            kind = {TAG: "object", "kind": value.kind, "class": value.class_name}
            return {**kind, "facts": facts, "state": state}
        items = self._items(value, path)
        if type(value) is tuple:
            return {TAG: "tuple", "items": items}
        fields = [*type(value)._fields]
        return {TAG: "namedtuple", "type": type_name(type(value)), "fields": fields, "items": items}

    def _items(self, values: Iterable[Any], path: str) -> list[Json]:
        return [self.value(item, join(path, index)) for index, item in enumerate(values)]

    def _dict(self, value: dict[Any, Any], path: str) -> Json:
        kind = type(value)
        if kind is dict and TAG not in value and all(type(k) is str and is_text(k) for k in value):
            return {key: self.value(item, join(path, key)) for key, item in value.items()}
        items = [[self._key(k, path), self.value(v, join(path, k))] for k, v in value.items()]
        if not isinstance(value, defaultdict):
            return {TAG: kind.__name__, "items": items}
        return {TAG: "defaultdict", "factory": _factory_name(value, path), "items": items}

    def _key(self, key: Any, path: str) -> Json:
        outer, self._in_key = self._in_key, True
        try:
            return self.value(key, path)
        finally:
            self._in_key = outer

    def _elements(self, values: Iterable[Any], path: str) -> list[Json]:
        """Encode the elements of a set; sorted by their text, since a set has no order to keep."""
        return sorted((self._key(value, path) for value in values), key=json.dumps)

    def _enum(self, value: Enum, path: str) -> Json:
        kind = type(value)
        node: dict[str, Json] = {TAG: "enum", "type": type_name(kind)}
        if kind.__members__.get(value.name or "") is value:
            return {**node, "name": value.name}
        if not isinstance(value, Flag):
            raise _unsupported(path, value)
        return {**node, "value": encode_int(value.value)}

    def _bytes(self, value: bytes | bytearray, path: str, tag: str) -> Json:
        if len(value) <= _INLINE_BYTES or self._in_key:
            return {TAG: tag, "hex": value.hex()}
        tensor = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        return {TAG: tag, "leaf": self._leaf(path, tensor, "U8", tuple(tensor.shape))}

    def _array(self, value: np.ndarray[Any, Any], path: str) -> Json:
        description = encode_dtype(value.dtype, path)
        node: dict[str, Json] = {TAG: "numpy.ndarray", "dtype": description}
        node["shape"] = [*value.shape]
        if value.flags.f_contiguous and not value.flags.c_contiguous:
            node["order"] = "F"
        if not value.flags.writeable:
            node["read_only"] = True
        dtype = SAFETENSORS_DESCRIPTIONS.get(description if isinstance(description, str) else "")
        tensor = _array_bytes(value)
        shape = value.shape if dtype is not None else (tensor.numel(),)
        node["leaf"] = self._leaf(path, tensor, dtype or "U8", shape)
        return node

    def _tensor(self, value: torch.Tensor, path: str) -> Json:
        if self._in_key:
            raise CaptureError(path, "a tensor cannot be a key or stand in a set")
        if is_sharded(value):
            return self._sharded(value, path)
        if type(value) not in _PLAIN_TENSORS and comes_apart(value) and not value.is_nested:
            return self._nested(value, path, self._subclass)
        if value.dtype in QUANTIZED:
            return self._quantized(value, path)
        node: dict[str, Json] = {TAG: "tensor"}
        self._tensors.append((self._unique(path), value))
        self._nodes.append(node)
        return node

    def _sharded(self, value: DTensor, path: str) -> Json:
        """Describe the whole tensor, and store the part of it that is here."""
        check_tensor(value, path)
        part = part_of(value, path, self._chunks)
        check_tensor(part.tensor, path)
        dtype, shape = stored_as(value.dtype, part.shape)
        path = self._unique(path)
        cut = (None, None) if part.is_whole else (part.offsets, part.global_shape)
        self._add(path, physical(part.tensor), dtype, shape, value, *cut)
        layout = {"dtype": dtype_name(value.dtype), "shape": [*part.global_shape]}
        return {TAG: "tensor", **describe_flags(value), "leaf": path, **layout}

    def _subclass(self, value: Any, path: str) -> Json:
        """Store the inner tensors, and what its class needs besides to put them together."""
        check_graph(value, path)
        parts, context = parts_of(value)
        return {
            TAG: "subclass",
            "type": type_name(type(value)),
            **describe_flags(value),
            "dtype": dtype_name(value.dtype),
            "shape": [*value.shape],
            "stride": [*value.stride()],
            "parts": {name: self.value(part, join(path, name)) for name, part in parts.items()},
            "context": self.value(context, f"{path}:context"),
        }

    def _quantized(self, value: torch.Tensor, path: str) -> Json:
        check_tensor(value, path)
        node: dict[str, Json] = {TAG: "quantized", "dtype": dtype_name(value.dtype)}
        scale: object
        zero: object
        if value.qscheme() == torch.per_tensor_affine:
            scale, zero = value.q_scale(), value.q_zero_point()
        elif value.qscheme() == torch.per_channel_affine:
            scale, zero = value.q_per_channel_scales(), value.q_per_channel_zero_points()
            node["axis"] = value.q_per_channel_axis()
        else:
            raise CaptureError(path, "cannot be stored", found=f"a {value.qscheme()} tensor")
        for key, part in (("integers", value.int_repr()), ("scale", scale), ("zero_point", zero)):
            node[key] = self.value(part, join(path, key))
        return node

    def check_tensors(self) -> None:
        """Raise if a tensor cannot be stored."""
        for path, tensor in self._tensors:
            check_tensor(tensor, path)

    def finish_tensors(self) -> None:
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
        seen = {number: self._ref_of(*self._tensors[number]) for number in changed}
        places = {number: resolve_aliases([one])[0] for number, one in seen.items()}
        if any(where.block is not seen[number].tensor for number, where in places.items()):
            return None
        nodes = {n: self._describe(n, where) for n, where in places.items()}
        spans = {number: one.span for number, one in seen.items()}
        blocks = {number: _block(where, number) for number, where in places.items()}
        return known.with_these(signatures, nodes, spans, blocks)

    def _place_tensors(self, signatures: list[Signature]) -> None:
        seen = [self._ref_of(path, tensor) for path, tensor in self._tensors]
        numbers = {id(one.tensor): number for number, one in enumerate(seen)}
        places = resolve_aliases(seen)
        blocks: dict[str, Block] = {}
        for number, (node, where) in enumerate(zip(self._nodes, places, strict=True)):
            node |= self._describe(number, where)
            if where.leaf not in blocks:  # -1: no tensor of the tree is all of it
                block = _block(where, numbers.get(id(where.block), -1))
                blocks[where.leaf] = block
                self._add(where.leaf, where.block, block.dtype, block.shape)
        if all(block.number >= 0 for block in blocks.values()):
            count = Counter(where.leaf for where in places)
            alone = frozenset(n for n, where in enumerate(places) if count[where.leaf] == 1)
            spans = [one.span for one in seen]
            self._memo.known = CacheEntry(signatures, self._nodes, spans, [*blocks.values()], alone)

    def _ref_of(self, path: str, tensor: torch.Tensor) -> TensorRef:
        check_tensor(tensor, path)
        return TensorRef.of(path, physical(tensor))

    def _describe(self, number: int, where: Placement) -> dict[str, Json]:
        return {**describe_flags(self._tensors[number][1]), **describe_placement(where)}

    def _leaf(self, path: str, tensor: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> str:
        path = self._unique(path)
        self._add(path, tensor, dtype, shape)
        return path

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


def type_name(kind: type) -> str:
    """Return the full name of a class; only ever compared with the names of classes at hand."""
    return stored_path(kind)


def _array_bytes(value: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return the elements in C order as bytes; the live memory itself where it is writable."""
    value = np.ascontiguousarray(value)
    if value.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    value = value if value.flags.writeable else value.copy()
    return torch.from_numpy(value.reshape(-1).view(np.uint8))


def _factory_name(value: defaultdict[Any, Any], path: str) -> str:
    for name, kind in FACTORIES.items():
        if value.default_factory is kind:
            return name
    raise CaptureError(
        path,
        "has a default factory that cannot be stored",
        expected=f"one of {', '.join(FACTORIES)}",
        found=value.default_factory,
        hint="turn it into a plain dict",
    )


def _unsupported(path: str, value: object) -> CaptureError:
    hint = "keep it out of the state, or turn it into numbers, strings, lists, dicts or tensors"
    if callable(value):
        hint = "code is not stored: keep a name in the state, and look it up when restoring"
    if hasattr(value, "state_dict"):
        hint = "put its state_dict() into the state, or register it as an object of its own"
    found = f"a {type_name(type(value))}"
    return CaptureError(path or "state", "cannot be stored", found=found, hint=hint)
