"""State tree <-> typed JSON and leaves: one table says how each kind of value is written and read.

Nothing is pickled; what cannot be stored is refused, with its path. What is read is not trusted:
every step is checked, and no name in the file is ever resolved to code.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, Flag
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from unbroken.capture.codec.leaves import (
    PLAIN_TENSORS,
    FileOf,
    LeafCollector,
    TensorLeaf,
    TensorMemo,
    check_graph,
    check_tensor,
    describe_flags,
    file_of,
)
from unbroken.capture.codec.scalars import (
    ENCODE,
    SAFETENSORS_DESCRIPTIONS,
    SCALARS,
    decode_dtype,
    encode_dtype,
    encode_int,
    is_text,
)
from unbroken.capture.kinds import modules, optimizers, random_state
from unbroken.capture.state_tree import Captured, is_namedtuple
from unbroken.capture.stored_tensor import (
    Blocks,
    LeafSource,
    StoredTensor,
    build_quantized,
    is_stored_tensor,
    load_tensors,
    read_subclass,
    read_tensor,
)
from unbroken.capture.tensors import QUANTIZED, comes_apart, dtype_name, is_sharded, parts_of
from unbroken.errors import CaptureError, CorruptCheckpointError, StateMismatchError
from unbroken.store.format.typed_json import (
    MAX_DEPTH,
    TAG,
    TAGS,
    Json,
    get,
    get_bytes,
    get_flag,
    get_int,
    get_shape,
    join,
    malformed,
)
from unbroken.stored_names import stored_path

FACTORIES: Mapping[str, type | None] = {
    "None": None,
    **{kind.__name__: kind for kind in (bool, int, float, complex, str, bytes)},
    **{kind.__name__: kind for kind in (list, tuple, dict, set, frozenset, OrderedDict, Counter)},
}
"""The default factories of a `defaultdict` that a checkpoint can name."""

_INLINE_BYTES = 1024  # longer byte strings become leaves
_UNFINISHED = object()


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
    leaves = LeafCollector(file_of, memo or TensorMemo())
    structure = _Encoder(leaves).value(tree, "")
    leaves.finish()
    return Encoded(structure, tuple(leaves.leaves))


def refuse_what_cannot_be_stored(tree: Any) -> None:
    """Raise what `encode` would raise; where the tensors lie in memory is not looked at.

    Args:
        tree: A state tree.

    Raises:
        CaptureError: A value cannot be stored; the error names its path and its type.
    """
    leaves = LeafCollector(file_of, TensorMemo())
    _Encoder(leaves).value(tree, "")
    leaves.check()


def decode(
    structure: Json, source: LeafSource, *, types: Iterable[type] = (), lazy: bool = False
) -> Any:
    """Return the state tree that `encode` was given.

    Nothing in the checkpoint is trusted: whatever does not fit together raises, memory is
    reserved only for leaves whose size the manifest confirms, and enums and named tuples are built
    only from classes in `types`, never by importing a name.

    Args:
        structure: `Encoded.structure`, as JSON gives it back.
        source: Where the leaves are; a `CheckpointReader` or the like.
        types: The enum, named-tuple and tensor classes that may occur; asked for when the first of
            them does.
        lazy: Put a `StoredTensor` in the place of each tensor, to be read later.

    Returns:
        The tree. Tensors are new ones on the CPU; those that shared memory share it again.

    Raises:
        CorruptCheckpointError: The structure is malformed or does not fit the manifest.
        StateMismatchError: It holds an enum or a named tuple that `types` lacks.
    """
    return _Decoder(source, types, lazy=lazy).value(structure, "", 0)


class _Encoder:
    """Walks a tree once."""

    def __init__(self, leaves: LeafCollector) -> None:
        self._leaves = leaves
        self._seen: dict[int, tuple[int, object]] = {}  # holds the objects, so that ids stay theirs
        self._open: list[int] = []
        self._in_key = False

    def value(self, value: Any, path: str) -> Json:
        """Encode one value of any kind."""
        scalar = ENCODE.get(type(value))
        if scalar is not None:
            return scalar(value, path)
        tag = _TAG_OF.get(type(value)) or _tag_of(value, path)
        if tag in SCALARS:
            return SCALARS[tag].encode(value, path)
        kind = CODECS[tag]
        if tag in _COUNTED:
            if id(value) in self._open:
                raise CaptureError(path, "contains itself", hint="cut the cycle before saving")
            if id(value) in self._seen:
                return {TAG: "same", "as": self._seen[id(value)][0]}
            self._seen[id(value)] = (len(self._seen), value)
        return self._nested(kind, value, path) if kind.nests else kind.encode(self, value, path)

    def _nested(self, kind: Codec, value: Any, path: str) -> Json:
        if len(self._open) >= MAX_DEPTH:
            raise CaptureError(path[:200], f"is nested deeper than {MAX_DEPTH} levels")
        self._open.append(id(value))
        try:
            return kind.encode(self, value, path)
        finally:
            self._open.pop()

    def items(self, values: Iterable[Any], path: str) -> list[Json]:
        """Encode values that are counted."""
        return [self.value(item, join(path, index)) for index, item in enumerate(values)]

    def elements(self, values: Iterable[Any], path: str) -> list[Json]:
        """Encode the elements of a set; sorted by their text, since a set has no order to keep."""
        return sorted((self._key(value, path) for value in values), key=json.dumps)

    def pairs(self, value: dict[Any, Any], path: str) -> list[Json]:
        """Encode keys with their values."""
        return [[self._key(k, path), self.value(v, join(path, k))] for k, v in value.items()]

    def _key(self, key: Any, path: str) -> Json:
        if _holds_a_tensor(key):  # be it one that stood elsewhere: it would come back as another
            what, hint = "a tensor cannot be a key or stand in a set", "use the parameter's name"
            raise CaptureError(path, what, hint=hint)
        outer, self._in_key = self._in_key, True
        try:
            return self.value(key, path)
        finally:
            self._in_key = outer

    def write_dict(self, value: dict[Any, Any], path: str) -> Json:
        if TAG not in value and all(type(key) is str and is_text(key) for key in value):
            return {key: self.value(item, join(path, key)) for key, item in value.items()}
        return {TAG: "dict", "items": self.pairs(value, path)}

    def write_defaultdict(self, value: defaultdict[Any, Any], path: str) -> Json:
        items = self.pairs(value, path)
        return {TAG: "defaultdict", "factory": _factory_name(value, path), "items": items}

    def write_object(self, value: Captured, path: str) -> Json:
        facts = {key: self.value(fact, f"{path}:{key}") for key, fact in value.facts.items()}
        state = self.value(value.state, path)
        kind = {TAG: "object", "kind": value.kind, "class": value.class_name}
        return {**kind, "facts": facts, "state": state}

    def write_namedtuple(self, value: Any, path: str) -> Json:
        node = {TAG: "namedtuple", "type": type_name(type(value))}
        return {**node, "fields": [*type(value)._fields], "items": self.items(value, path)}

    def write_enum(self, value: Enum, path: str) -> Json:
        kind = type(value)
        node: dict[str, Json] = {TAG: "enum", "type": type_name(kind)}
        if kind.__members__.get(value.name or "") is value:
            return {**node, "name": value.name}
        if not isinstance(value, Flag):
            raise _unsupported(path, value)
        return {**node, "value": encode_int(value.value)}

    def write_bytes(self, value: bytes | bytearray, path: str) -> Json:
        tag = type(value).__name__
        if len(value) <= _INLINE_BYTES or self._in_key:
            return {TAG: tag, "hex": value.hex()}
        memory = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        return {TAG: tag, "leaf": self._leaves.add_bytes(path, memory, "U8", tuple(memory.shape))}

    def write_array(self, value: np.ndarray[Any, Any], path: str) -> Json:
        description = encode_dtype(value.dtype, path)
        node: dict[str, Json] = {TAG: "numpy.ndarray", "dtype": description}
        node["shape"] = [*value.shape]
        if value.flags.f_contiguous and not value.flags.c_contiguous:
            node["order"] = "F"
        if not value.flags.writeable:
            node["read_only"] = True
        dtype = SAFETENSORS_DESCRIPTIONS.get(description if isinstance(description, str) else "")
        memory = _array_bytes(value)
        shape = value.shape if dtype is not None else (memory.numel(),)
        node["leaf"] = self._leaves.add_bytes(path, memory, dtype or "U8", shape)
        return node

    def write_tensor(self, value: torch.Tensor, path: str) -> Json:
        return self._leaves.add_tensor(value, path)

    def write_subclass(self, value: Any, path: str) -> Json:
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

    def write_quantized(self, value: torch.Tensor, path: str) -> Json:
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


def _holds_a_tensor(key: Any) -> bool:
    if isinstance(key, tuple | frozenset):
        return any(_holds_a_tensor(one) for one in key)
    return isinstance(key, torch.Tensor)


class _Decoder:
    """Walks a structure in the order of its encoder, counting the values that may occur twice."""

    def __init__(self, source: LeafSource, types: Iterable[type], *, lazy: bool) -> None:
        self._source = source
        self._given = types
        self._lazy = lazy
        self._seen: list[Any] = []
        self._blocks: Blocks = {}

    @cached_property
    def _types(self) -> tuple[type, ...]:
        return tuple(self._given)

    def value(self, node: Json, path: str, depth: int) -> Any:
        """Decode one node of any kind."""
        if depth > MAX_DEPTH + 2:
            raise malformed(path[:200], f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, dict) and TAG in node:
            return self._tagged(node, path, depth)
        if isinstance(node, (dict, list)):
            return self._counted(_Decoder.untagged, node, path, depth)
        if node is None or type(node) in (bool, int, float, str):
            return node
        raise malformed(path, "not a JSON value", node)

    def _tagged(self, node: Json, path: str, depth: int) -> Any:
        tag = get(node, TAG, str, path)
        kind = TAGS.get(tag)
        if kind is None:
            raise malformed(path, "a value of unknown kind", tag)
        if kind.is_counted:
            return self._counted(CODECS[tag].decode, node, path, depth)
        if tag in SCALARS:
            return SCALARS[tag].decode(node, path)
        if tag == "same":
            return self._same(node, path)
        return CODECS[tag].decode(self, node, path, depth)

    def _counted(self, read: _Read, node: Json, path: str, depth: int) -> Any:
        """Decode a value that a later "same" may refer to by its number."""
        number = len(self._seen)
        self._seen.append(_UNFINISHED)
        self._seen[number] = read(self, node, path, depth)
        return self._seen[number]

    def _same(self, node: Json, path: str) -> Any:
        number = get(node, "as", int, path)
        if not 0 <= number < len(self._seen) or self._seen[number] is _UNFINISHED:
            raise malformed(path, "a reference to nothing", number)
        return self._seen[number]

    def untagged(self, node: Json, path: str, depth: int) -> Any:
        if isinstance(node, list):
            return self._values(node, path, depth)
        return {key: self.value(item, join(path, key), depth + 1) for key, item in node.items()}

    def _values(self, nodes: list[Json], path: str, depth: int) -> list[Any]:
        return [self.value(item, join(path, i), depth + 1) for i, item in enumerate(nodes)]

    def items(self, node: Json, path: str, depth: int) -> list[Any]:
        """Decode values that are counted."""
        return self._values(get(node, "items", list, path), path, depth)

    def pairs(self, node: Json, path: str, depth: int) -> list[tuple[Any, Any]]:
        """Decode keys with their values."""
        pairs = []
        for item in get(node, "items", list, path):
            if not isinstance(item, list) or len(item) != 2:
                raise malformed(path, "not a pair of key and value", item)
            key = _hashable(self.value(item[0], path, depth + 1), path)
            pairs.append((key, self.value(item[1], join(path, key), depth + 1)))
        if len(dict(pairs)) != len(pairs):
            raise malformed(path, "a key occurs twice")
        return pairs

    def read_defaultdict(self, node: Json, path: str, depth: int) -> Any:
        factory = get(node, "factory", str, path)
        if factory not in FACTORIES:
            raise malformed(path, "an unknown default factory", factory)
        return defaultdict(FACTORIES[factory], self.pairs(node, path, depth))

    def read_deque(self, node: Json, path: str, depth: int) -> Any:
        items = self.items(node, path, depth)
        if node.get("maxlen") is None:
            return deque(items)
        maxlen = get(node, "maxlen", int, path)
        if not len(items) <= maxlen < 2**63:
            raise malformed(path, "a wrong maxlen", maxlen)
        return deque(items, maxlen)

    def read_set(self, node: Json, path: str, depth: int) -> Any:
        items = [_hashable(item, path) for item in self.items(node, path, depth)]
        result = frozenset(items) if node[TAG] == "frozenset" else set(items)
        if len(result) != len(items):
            raise malformed(path, "an element occurs twice")
        return result

    def read_object(self, node: Json, path: str, depth: int) -> Any:
        kind, class_name = (get(node, key, str, path) for key in ("kind", "class"))
        facts = {
            key: self.value(fact, f"{path}:{key}", depth + 1)
            for key, fact in get(node, "facts", dict, path).items()
        }
        state = self.value(node.get("state"), path, depth + 1)
        if kind in _FITS and not _FITS[kind](state, facts):
            raise malformed(path, f"not what a {kind.replace('_', ' ')} is made of")
        return Captured(kind, class_name, state, facts)

    def read_namedtuple(self, node: Json, path: str, depth: int) -> Any:
        kind = self._type(node, path)
        fields = get(node, "fields", list, path)
        items = self.items(node, path, depth)
        found = list(getattr(kind, "_fields", ()))
        if not is_namedtuple_class(kind) or found != fields or len(items) != len(fields):
            what = f"{type_name(kind)} has other fields"
            raise StateMismatchError(path, what, expected=fields, found=found)
        return tuple.__new__(kind, items)

    def read_enum(self, node: Json, path: str, _depth: int) -> Any:
        kind = self._type(node, path)
        if not issubclass(kind, Enum):
            raise StateMismatchError(path, "is no enum here", found=type_name(kind))
        if "name" in node:
            member = kind.__members__.get(get(node, "name", str, path))
            if member is not None:
                return member
            stored: object = node["name"]
        else:
            stored = get_int(node, "value", path)
            with suppress(ValueError):
                return kind(stored)
        raise StateMismatchError(path, f"{type_name(kind)} has no such member", expected=stored)

    def _type(self, node: Json, path: str) -> type:
        """Return the caller's class for a stored name; the module decides only between two."""
        name = get(node, "type", str, path)
        exact = [kind for kind in self._types if type_name(kind) == name]
        named = [kind for kind in self._types if f".{name}".endswith(f".{kind.__qualname__}")]
        if len(exact or named) != 1:
            raise StateMismatchError(
                path,
                "is of a class that was not given",
                expected=name,
                hint=f"pass the class itself: types=[{name.rpartition('.')[2]}]",
            )
        return (exact or named)[0]

    def read_tensor(self, node: Json, path: str, _depth: int) -> Any:
        stored = read_tensor(node, path, self._leaf(node, path), self._source)
        return stored if self._lazy else stored.load("cpu", self._blocks)

    def read_subclass(self, node: Json, path: str, depth: int) -> Any:
        parts = {
            name: self.value(part, join(path, name), depth + 1)
            for name, part in get(node, "parts", dict, path).items()
        }
        context = self.value(node.get("context"), f"{path}:context", depth + 1)
        name = get(node, "type", str, path)
        kind = next((one for one in self._types if type_name(one) == name), None)
        stored = read_subclass(node, path, parts, context, kind)
        return stored if self._lazy else stored.load("cpu", self._blocks)

    def read_quantized(self, node: Json, path: str, depth: int) -> Any:
        integers, scale, zero = (
            load_tensors(self.value(node.get(key), join(path, key), depth + 1), "cpu")
            for key in ("integers", "scale", "zero_point")
        )
        return build_quantized(node, integers, scale, zero, path)

    def read_array(self, node: Json, path: str, _depth: int) -> Any:
        dtype = decode_dtype(node, path)
        shape = get_shape(node, path, max(dtype.itemsize, 1))
        memory = self._memory(node, path, math.prod(shape) * dtype.itemsize)
        try:
            value: Any = np.ndarray(shape, dtype, buffer=memory)
        except ValueError as error:
            raise malformed(path, "not the shape of an array", shape) from error
        value = np.asfortranarray(value) if node.get("order") == "F" else value
        value.flags.writeable = not get_flag(node, "read_only", path)
        return value

    def read_bytes(self, node: Json, path: str, _depth: int) -> Any:
        kind = bytes if node[TAG] == "bytes" else bytearray
        if "hex" in node:
            return kind(get_bytes(node, "hex", path))
        return kind(self._memory(node, path))

    def _memory(self, node: Json, path: str, expected: int | None = None) -> Any:
        """Read a leaf as bytes; its size is checked before memory is reserved."""
        leaf = self._leaf(node, path)
        nbytes = self._source.manifest.tensors[leaf].nbytes
        if expected is not None and nbytes != expected:
            what = "the structure and the manifest disagree on its bytes"
            raise CorruptCheckpointError(path, what, expected=expected, found=nbytes)
        memory = np.empty(nbytes, np.uint8)
        self._source.read_leaf_into(leaf, memory.data)
        return memory

    def _leaf(self, node: Json, path: str) -> str:
        leaf: str = get(node, "leaf", str, path)
        if leaf not in self._source.manifest.tensors:
            raise CorruptCheckpointError(path, "its leaf is not in the manifest", expected=leaf)
        return leaf


def _hashable(key: Any, path: str) -> Any:
    if isinstance(key, Hashable) and not isinstance(key, (torch.Tensor, StoredTensor)):
        try:
            hash(key)
        except TypeError:
            pass
        else:
            return key
    raise malformed(path, "a key that cannot be one")


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


# The table.


_Write = Callable[[_Encoder, Any, str], Json]
_Read = Callable[[_Decoder, Json, str, int], Any]


class Codec(NamedTuple):
    """How one kind of value is written and read.

    Attributes:
        types: The exact types that are of this kind; `_tag_of` knows those that are not listed.
        encode: Gives the node of a value.
        decode: Gives the value of a node.
        nests: Whether it counts as a level of nesting.
    """

    types: tuple[type, ...]
    encode: _Write
    decode: _Read
    nests: bool = True


def _sequence(tag: str) -> _Write:
    return lambda encoder, value, path: {TAG: tag, "items": encoder.items(value, path)}


def _set(tag: str) -> _Write:
    return lambda encoder, value, path: {TAG: tag, "items": encoder.elements(value, path)}


def _mapping(tag: str) -> _Write:
    return lambda encoder, value, path: {TAG: tag, "items": encoder.pairs(value, path)}


def _write_deque(encoder: _Encoder, value: deque[Any], path: str) -> Json:
    items = encoder.items(value, path)
    return {TAG: "deque", "maxlen": value.maxlen, "items": items}


def _read_as(kind: Callable[[Any], Any]) -> _Read:
    return lambda decoder, node, path, depth: kind(decoder.items(node, path, depth))


def _read_pairs_as(kind: Callable[[Any], Any]) -> _Read:
    return lambda decoder, node, path, depth: kind(decoder.pairs(node, path, depth))


CODECS: Mapping[str, Codec] = {
    "list": Codec((list,), _Encoder.items, _Decoder.untagged),
    "tuple": Codec((tuple,), _sequence("tuple"), _read_as(tuple)),
    "namedtuple": Codec((), _Encoder.write_namedtuple, _Decoder.read_namedtuple),
    "deque": Codec((deque,), _write_deque, _Decoder.read_deque),
    "set": Codec((set,), _set("set"), _Decoder.read_set),
    "frozenset": Codec((frozenset,), _set("frozenset"), _Decoder.read_set),
    "dict": Codec((dict,), _Encoder.write_dict, _read_pairs_as(dict)),
    "OrderedDict": Codec((OrderedDict,), _mapping("OrderedDict"), _read_pairs_as(OrderedDict)),
    "Counter": Codec((Counter,), _mapping("Counter"), _read_pairs_as(lambda p: Counter(dict(p)))),
    "defaultdict": Codec((defaultdict,), _Encoder.write_defaultdict, _Decoder.read_defaultdict),
    "object": Codec((Captured,), _Encoder.write_object, _Decoder.read_object),
    "enum": Codec((), _Encoder.write_enum, _Decoder.read_enum, nests=False),
    "bytes": Codec((bytes,), _Encoder.write_bytes, _Decoder.read_bytes, nests=False),
    "bytearray": Codec((bytearray,), _Encoder.write_bytes, _Decoder.read_bytes),
    "numpy.ndarray": Codec((np.ndarray,), _Encoder.write_array, _Decoder.read_array),
    "tensor": Codec((), _Encoder.write_tensor, _Decoder.read_tensor, nests=False),
    "quantized": Codec((), _Encoder.write_quantized, _Decoder.read_quantized, nests=False),
    "subclass": Codec((), _Encoder.write_subclass, _Decoder.read_subclass),
}
"""Every kind of value that is no scalar, by its tag; a list is written without one."""

_COUNTED = {"list", *(tag for tag, kind in TAGS.items() if kind.is_counted)}
_TAG_OF = {kind: tag for tag, codec in CODECS.items() for kind in codec.types}


def _tag_of(value: Any, path: str) -> str:
    """Return the kind of a value whose exact type does not tell."""
    if isinstance(value, torch.Tensor):
        if type(value) not in PLAIN_TENSORS:
            if is_sharded(value):
                return "tensor"
            if comes_apart(value) and not value.is_nested:
                return "subclass"
        return "quantized" if value.dtype in QUANTIZED else "tensor"
    if isinstance(value, Enum):
        return "enum"
    if is_namedtuple(value):
        return "namedtuple"
    if isinstance(value, np.dtype):
        return "numpy.dtype"
    if isinstance(value, np.generic) and type(value) is value.dtype.type:
        return "numpy.scalar"
    raise _unsupported(path, value)


def is_namedtuple_class(kind: type) -> bool:
    """Return whether `kind` is a class of named tuples whose instances hold nothing else."""
    return issubclass(kind, tuple) and is_namedtuple(tuple.__new__(kind))


_FITS: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "module": modules.is_module_state,
    "optimizer": optimizers.is_optimizer_state,
    "scheduler": optimizers.is_scheduler_state,
    "grad_scaler": optimizers.is_scaler_state,
    "tensor": lambda state, _facts: is_stored_tensor(state),
    "torch_generator": random_state.is_torch_state,
    "numpy_generator": random_state.is_numpy_state,
}
"""By kind, whether state and facts are what such an object is made of; of others any will do."""
