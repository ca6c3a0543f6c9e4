"""Typed JSON, as `state.json` holds it: its text, its tags, and strict access to its fields.

A JSON object with the key "$" is one value of another type than JSON has; its tag names the type.
`TAGS` says of each what lies in it. `unbroken.capture` writes such values and reads them back;
what only compares them needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from unbroken.errors import CorruptCheckpointError

Json = Any
"""A value of JSON: None, bool, int, float, str, list or dict with str keys."""

TAG = "$"
"""The key that marks a JSON object as a typed value and not as a plain dict."""

MAX_DEPTH = 64
"""How deep a state tree may be nested."""

EXACT_INT = 2**53
"""Below this size every reader of JSON keeps an integer exactly."""


# The kinds of values, and what lies in each.


class InnerValue(NamedTuple):
    """A value inside another: its key there, and what it adds to the path: ".lr", ":class"."""

    key: str
    end: str
    node: Json


class Tag(NamedTuple):
    """A kind of value.

    Attributes:
        is_counted: Whether it may occur twice: the second one is {"$": "same", "as": number}.
        nested: The fields that hold values of their own; the others describe the value.
        children: Gives these values in the order in which they are written; None where the fields
            do not hold what they should.
        is_leaf: Whether its bytes can lie in a leaf, which its field "leaf" names.
        has_order: Whether the order of its keys is part of the value.
        has_length: Whether its parts are counted, not named.
    """

    is_counted: bool = False
    nested: Sequence[str] = ()
    children: Callable[[Mapping[str, Json]], list[InnerValue] | None] | None = None
    is_leaf: bool = False
    has_order: bool = False
    has_length: bool = False


def _elements(node: Mapping[str, Json]) -> list[InnerValue] | None:
    items = node.get("items")
    return elements_of(items) if isinstance(items, list) else None


def elements_of(items: Iterable[Json]) -> list[InnerValue]:
    """Return the elements of a list, by number."""
    return [InnerValue(str(number), f".{number}", item) for number, item in enumerate(items)]


def _pairs(node: Mapping[str, Json]) -> list[InnerValue] | None:
    """Return the values of a dict by their keys, of which none may occur twice."""
    items = node.get("items")
    if not isinstance(items, list):
        return None
    pairs = [item for item in items if isinstance(item, list) and len(item) == 2]
    found = [InnerValue(json.dumps(key), f".{_key_text(key)}", value) for key, value in pairs]
    return found if len({child.key for child in found}) == len(items) else None


def _key_text(key: Json) -> str:
    """Return a key as the paths of leaves spell it."""
    if isinstance(key, str):
        return key
    return f"<{key.get(TAG)}>" if isinstance(key, Mapping) else repr(key)


def _object(node: Mapping[str, Json]) -> list[InnerValue] | None:
    facts = node.get("facts")
    if not isinstance(facts, Mapping):
        return None
    found = [InnerValue(f"fact {key}", f":{key}", fact) for key, fact in facts.items()]
    return [*found, InnerValue("state", "", node["state"])] if "state" in node else found


def _subclass(node: Mapping[str, Json]) -> list[InnerValue] | None:
    parts = node.get("parts")
    if not isinstance(parts, Mapping):
        return None
    found = [InnerValue(f"part {name}", f".{name}", part) for name, part in parts.items()]
    return [*found, InnerValue("context", ":context", node.get("context"))]


_QUANTIZED = ("integers", "scale", "zero_point")


def _quantized(node: Mapping[str, Json]) -> list[InnerValue]:
    return [InnerValue(name, f".{name}", node[name]) for name in _QUANTIZED if name in node]


_DICT = Tag(is_counted=True, nested=("items",), children=_pairs, has_order=True)
_SEQUENCE = Tag(nested=("items",), children=_elements, has_length=True)
_WHOLE = Tag()

TAGS: Mapping[str, Tag] = {
    "tuple": _SEQUENCE,
    "namedtuple": _SEQUENCE,
    "torch.Size": _SEQUENCE,
    "deque": _SEQUENCE._replace(is_counted=True),
    "dict": _DICT,
    "OrderedDict": _DICT,
    "Counter": _DICT,
    "defaultdict": _DICT,
    "object": Tag(nested=("facts", "state"), children=_object),
    "tensor": Tag(is_counted=True, is_leaf=True),
    "numpy.ndarray": Tag(is_counted=True, is_leaf=True),
    "quantized": Tag(is_counted=True, nested=_QUANTIZED, children=_quantized),
    "subclass": Tag(is_counted=True, nested=("parts", "context"), children=_subclass),
    "bytes": Tag(is_leaf=True),
    "bytearray": Tag(is_counted=True, is_leaf=True),
    "set": Tag(is_counted=True),
    **dict.fromkeys(("frozenset", "enum", "same", "int", "float", "complex", "str"), _WHOLE),
    **dict.fromkeys(("torch.dtype", "torch.device", "torch.layout", "torch.memory_format"), _WHOLE),
    **dict.fromkeys(("numpy.dtype", "numpy.scalar", "numpy.str_", "numpy.bytes_"), _WHOLE),
}
"""Every tag of the format; a value of another one is malformed."""


# The text of a structure, and strictly back.


def structure_to_bytes(structure: Json) -> bytes:
    r"""Return the structure as one line of JSON text, keys in the order of insertion.

    Args:
        structure: `Encoded.structure`.

    Example:
        >>> structure_to_bytes({"step": 3})
        b'{"step": 3}\n'
    """
    return (json.dumps(structure, allow_nan=False) + "\n").encode("ascii")


def structure_from_bytes(raw: bytes, where: str) -> Json:
    """Read what `structure_to_bytes` wrote; anything else is refused, not repaired.

    Args:
        raw: The bytes of the file.
        where: The file; for the message.

    Raises:
        CorruptCheckpointError: Not JSON, or with duplicate keys, NaN tokens, integers that other
            readers would round, or nested too deep.
    """

    def refuse(token: str) -> NoReturn:
        raise ValueError(f"not a JSON value: {token[:40]}")

    def exact_int(digits: str) -> int:
        if len(digits) > len(str(EXACT_INT)) + 1 or abs(int(digits)) >= EXACT_INT:
            refuse(digits)
        return int(digits)

    try:
        return json.loads(
            raw.decode("utf-8"),
            parse_constant=refuse,
            parse_int=exact_int,
            object_pairs_hook=_without_duplicates,
        )
    except RecursionError as error:
        raise CorruptCheckpointError(where, "nested too deep") from error
    except ValueError as error:
        raise CorruptCheckpointError(where, f"not a state structure: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


# Strict access to the JSON nodes of a structure: a field has its type, or an error says so.


_MAX_DIMENSIONS = 64
_MAX_BYTES = 2**62


def malformed(path: str, what: str, found: object = None) -> CorruptCheckpointError:
    """Return the error for a node that `encode` never writes."""
    shown = None if found is None else repr(found)[:80]
    return CorruptCheckpointError(path or "state", f"malformed: {what}", found=shown)


def join(path: str, key: object) -> str:
    """Return the path of what stands under `key`."""
    if isinstance(key, str):
        plain = key if key.isascii() else key.encode("utf-8", "backslashreplace").decode()
        part = plain[:200]
    elif key is None or type(key) in (bool, float) or (type(key) is int and abs(key) < 2**63):
        part = repr(key)
    else:
        part = f"<{type(key).__name__}>"
    return f"{path}.{part}" if path else part


def get(node: Json, key: str, kind: type, path: str) -> Any:
    """Return the field, which must be exactly of this type."""
    value = node.get(key) if isinstance(node, dict) else None
    if type(value) is not kind:
        raise malformed(path, f"{key!r} must be a {kind.__name__}", value)
    return value


def get_flag(node: Json, key: str, path: str) -> bool:
    """Return the field, which must be true or false; absent means false."""
    return bool(get(node, key, bool, path)) if key in node else False


def get_bytes(node: Json, key: str, path: str) -> bytes:
    """Return the bytes that the field gives in hexadecimal."""
    try:
        return bytes.fromhex(get(node, key, str, path))
    except ValueError as error:
        raise malformed(path, f"{key!r} is not hexadecimal") from error


def get_int(node: Json, key: str, path: str, default: int | None = None) -> int:
    """Return the field, an integer of any size."""
    value = node.get(key, default)
    if isinstance(value, dict) and value.get(TAG) == "int":
        return hex_int(value, path)
    if type(value) is not int:
        raise malformed(path, f"{key!r} must be an integer", value)
    return value


def hex_int(node: Json, path: str) -> int:
    """Return the integer that a node of kind "int" holds."""
    try:
        return int(get(node, "hex", str, path), 16)
    except ValueError as error:
        raise malformed(path, "not hexadecimal") from error


def get_numbers(node: Json, key: str, path: str) -> tuple[int, ...]:
    """Return the field, a list of at most 64 sizes or strides."""
    value = get(node, key, list, path)
    if len(value) > _MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in value):
        raise malformed(path, f"{key!r} must be a list of sizes", value)
    return tuple(value)


def get_shape(node: Json, path: str, itemsize: int) -> tuple[int, ...]:
    """Return the field "shape" of an array with elements of `itemsize` bytes."""
    shape = get_numbers(node, "shape", path)
    if math.prod(max(size, 1) for size in shape) * itemsize >= _MAX_BYTES:
        raise malformed(path, "too large a shape", shape)
    return shape
