"""The structure of a state tree as JSON text, and strictly back."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from unbroken.errors import CorruptCheckpointError

Json = Any
"""A value of JSON: None, bool, int, float, str, list or dict with str keys."""

TAG = "$"
"""The key that marks a JSON object as a typed value and not as a plain dict."""

MAX_DEPTH = 64
"""How deep a state tree may be nested."""

EXACT_INT = 2**53
"""Below this size every reader of JSON keeps an integer exactly."""


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
