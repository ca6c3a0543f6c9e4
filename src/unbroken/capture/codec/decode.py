"""Typed JSON and leaves -> state tree.

Every step is checked, and no name in the file is ever resolved to code.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import torch

from unbroken.capture.codec.encode import FACTORIES, type_name
from unbroken.capture.codec.scalars import DECODE, decode_dtype
from unbroken.capture.codec.tensors import build_quantized, read_subclass, read_tensor
from unbroken.capture.codec.typed_json import (
    MAX_DEPTH,
    TAG,
    Json,
    get,
    get_bytes,
    get_flag,
    get_int,
    get_shape,
    join,
    malformed,
)
from unbroken.capture.state_tree import Captured, is_namedtuple
from unbroken.capture.stored_tensor import (
    Blocks,
    LeafSource,
    StoredSubclass,
    StoredTensor,
    load_tensors,
)
from unbroken.errors import CorruptCheckpointError, StateMismatchError

_UNFINISHED = object()


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
            return self._counted(_Decoder._untagged, node, path, depth)
        if node is None or type(node) in (bool, int, float, str):
            return node
        raise malformed(path, "not a JSON value", node)

    def _tagged(self, node: Json, path: str, depth: int) -> Any:
        tag = get(node, TAG, str, path)
        if tag in DECODE:
            return DECODE[tag](node, path)
        if tag in _IMMUTABLE:
            return _IMMUTABLE[tag](self, node, path, depth)
        if tag in _MUTABLE:
            return self._counted(_MUTABLE[tag], node, path, depth)
        raise malformed(path, "a value of unknown kind", tag)

    def _counted(self, read: _Read, node: Json, path: str, depth: int) -> Any:
        """Decode a value that a later "same" may refer to by its number."""
        number = len(self._seen)
        self._seen.append(_UNFINISHED)
        self._seen[number] = read(self, node, path, depth)
        return self._seen[number]

    def _untagged(self, node: Json, path: str, depth: int) -> Any:
        if isinstance(node, list):
            return self._values(node, path, depth)
        return {key: self.value(item, join(path, key), depth + 1) for key, item in node.items()}

    def read_same(self, node: Json, path: str, _depth: int) -> Any:
        number = get(node, "as", int, path)
        if not 0 <= number < len(self._seen) or self._seen[number] is _UNFINISHED:
            raise malformed(path, "a reference to nothing", number)
        return self._seen[number]

    def _values(self, nodes: list[Json], path: str, depth: int) -> list[Any]:
        return [self.value(item, join(path, i), depth + 1) for i, item in enumerate(nodes)]

    def _items(self, node: Json, path: str, depth: int) -> list[Any]:
        return self._values(get(node, "items", list, path), path, depth)

    def _pairs(self, node: Json, path: str, depth: int) -> list[tuple[Any, Any]]:
        pairs = []
        for item in get(node, "items", list, path):
            if not isinstance(item, list) or len(item) != 2:
                raise malformed(path, "not a pair of key and value", item)
            key = _hashable(self.value(item[0], path, depth + 1), path)
            pairs.append((key, self.value(item[1], join(path, key), depth + 1)))
        if len(dict(pairs)) != len(pairs):
            raise malformed(path, "a key occurs twice")
        return pairs

    def read_dict(self, node: Json, path: str, depth: int) -> Any:
        kind = OrderedDict if node[TAG] == "OrderedDict" else dict
        return kind(self._pairs(node, path, depth))

    def read_counter(self, node: Json, path: str, depth: int) -> Any:
        return Counter(dict(self._pairs(node, path, depth)))

    def read_defaultdict(self, node: Json, path: str, depth: int) -> Any:
        factory = get(node, "factory", str, path)
        if factory not in FACTORIES:
            raise malformed(path, "an unknown default factory", factory)
        return defaultdict(FACTORIES[factory], self._pairs(node, path, depth))

    def read_deque(self, node: Json, path: str, depth: int) -> Any:
        items = self._items(node, path, depth)
        if node.get("maxlen") is None:
            return deque(items)
        maxlen = get(node, "maxlen", int, path)
        if not len(items) <= maxlen < 2**63:
            raise malformed(path, "a wrong maxlen", maxlen)
        return deque(items, maxlen)

    def read_set(self, node: Json, path: str, depth: int) -> Any:
        items = [_hashable(item, path) for item in self._items(node, path, depth)]
        result = frozenset(items) if node[TAG] == "frozenset" else set(items)
        if len(result) != len(items):
            raise malformed(path, "an element occurs twice")
        return result

    def read_tuple(self, node: Json, path: str, depth: int) -> Any:
        return tuple(self._items(node, path, depth))

    def read_object(self, node: Json, path: str, depth: int) -> Any:
        kind, class_name = (get(node, key, str, path) for key in ("kind", "class"))
        facts = {
            key: self.value(fact, f"{path}:{key}", depth + 1)
            for key, fact in get(node, "facts", dict, path).items()
        }
        state = self.value(node.get("state"), path, depth + 1)
        if kind in _SHAPES and not _SHAPES[kind](state, facts):
            raise malformed(path, f"not what a {kind.replace('_', ' ')} is made of")
        return Captured(kind, class_name, state, facts)

    def read_namedtuple(self, node: Json, path: str, depth: int) -> Any:
        kind = self._type(node, path)
        fields = get(node, "fields", list, path)
        items = self._items(node, path, depth)
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


def is_namedtuple_class(kind: type) -> bool:
    """Tell whether `kind` is a class of named tuples whose instances hold nothing else."""
    return issubclass(kind, tuple) and is_namedtuple(tuple.__new__(kind))


def _hashable(key: Any, path: str) -> Any:
    if isinstance(key, Hashable) and not isinstance(key, (torch.Tensor, StoredTensor)):
        try:
            hash(key)
        except TypeError:
            pass
        else:
            return key
    raise malformed(path, "a key that cannot be one")


def _is_module(state: Any, facts: Mapping[str, Any]) -> bool:
    parts = (state, facts.get("buffers", {}), facts.get("extra_state", {}))
    return (
        all(map(_is_named, parts))
        and all(hasattr(tensor, "shape") for part in parts[:2] for tensor in part.values())
        and _is_names(facts.get("eval", []))
    )


def _is_optimizer(state: Any, facts: Mapping[str, Any]) -> bool:
    groups = state.get("param_groups") if isinstance(state, dict) else None
    more = (facts.get(name, {}) for name in ("devices", "shared", "more"))
    return (
        isinstance(groups, list)
        and all(_is_named(group) and _is_names(group.get("params")) for group in groups)
        and _is_named(state.get("state"))
        and all(isinstance(one, dict) for one in more)
    )


def _is_scheduler(state: Any, facts: Mapping[str, Any]) -> bool:
    rates = facts.get("lr")
    return _is_named(state) and isinstance(rates, list) and all(map(_is_number, rates))


def _is_grad_scaler(state: Any, _facts: Mapping[str, Any]) -> bool:
    return _is_named(state) and (
        not state or (_SCALER.issubset(state) and all(map(_is_number, state.values())))
    )


def _is_number(value: Any) -> bool:
    is_stored = isinstance(value, StoredTensor | torch.Tensor) and tuple(value.shape) in ((), (1,))
    return is_stored or (type(value) in (int, float) and abs(value) < 2**63) or value != value


def _is_tensor(value: Any, _facts: Mapping[str, Any]) -> bool:
    return isinstance(value, StoredTensor | StoredSubclass | torch.Tensor)


def _is_torch_generator(state: Any, _facts: Mapping[str, Any]) -> bool:
    return (
        _is_named(state)
        and isinstance(state.get("device"), str)
        and _is_tensor(state.get("state"), {})
    )


def _is_numpy_generator(state: Any, _facts: Mapping[str, Any]) -> bool:
    sequence = state.get("seed_sequence") if isinstance(state, dict) else ...
    return _is_named(state) and _is_named(state.get("bits")) and _is_named(sequence or {})


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
_SHAPES: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "module": _is_module,
    "optimizer": _is_optimizer,
    "scheduler": _is_scheduler,
    "grad_scaler": _is_grad_scaler,
    "tensor": _is_tensor,
    "torch_generator": _is_torch_generator,
    "numpy_generator": _is_numpy_generator,
}
"""What the state and the facts of an object look like, by its kind; of others any will do."""


_Read = Callable[[_Decoder, Json, str, int], Any]

_IMMUTABLE: Mapping[str, _Read] = {
    "same": _Decoder.read_same,
    "tuple": _Decoder.read_tuple,
    "namedtuple": _Decoder.read_namedtuple,
    "enum": _Decoder.read_enum,
    "frozenset": _Decoder.read_set,
    "bytes": _Decoder.read_bytes,
    "object": _Decoder.read_object,
}
_MUTABLE: Mapping[str, _Read] = {
    "dict": _Decoder.read_dict,
    "OrderedDict": _Decoder.read_dict,
    "Counter": _Decoder.read_counter,
    "defaultdict": _Decoder.read_defaultdict,
    "deque": _Decoder.read_deque,
    "set": _Decoder.read_set,
    "bytearray": _Decoder.read_bytes,
    "numpy.ndarray": _Decoder.read_array,
    "tensor": _Decoder.read_tensor,
    "quantized": _Decoder.read_quantized,
    "subclass": _Decoder.read_subclass,
}
