"""NumPy arrays and scalars: their dtypes as JSON, their bytes as leaves."""

from __future__ import annotations

from typing import Any

import numpy as np

_KINDS = frozenset("biufcSUVmM")
_MAX_DEPTH = 16

SAFETENSORS_DESCRIPTIONS = {
    "|b1": "BOOL",
    "|u1": "U8",
    "|i1": "I8",
    "<i2": "I16",
    "<u2": "U16",
    "<f2": "F16",
    "<i4": "I32",
    "<u4": "U32",
    "<f4": "F32",
    "<i8": "I64",
    "<u8": "U64",
    "<f8": "F64",
    "<c8": "C64",
}
"""The array dtypes that safetensors files name; others are stored as raw bytes, "U8"."""


def describe_dtype(dtype: np.dtype[Any]) -> Any:
    """Return `dtype` as JSON: a string, or a list of fields.

    Raises:
        ValueError: The dtype holds Python objects, or has a part that JSON would lose.
    """
    if not _is_plain(dtype):
        raise ValueError(f"the dtype {dtype} cannot be stored")
    description = _as_lists(np.lib.format.dtype_to_descr(dtype))
    if not _same(read_dtype(description), dtype):
        raise ValueError(f"the dtype {dtype} cannot be stored")
    return description


def read_dtype(description: Any) -> np.dtype[Any]:
    """Return the dtype that `describe_dtype` described.

    Raises:
        ValueError: It is no description of a dtype of plain bytes.
    """
    try:
        dtype = np.lib.format.descr_to_dtype(_as_tuples(description, 0))
    except (TypeError, KeyError, IndexError, SyntaxError, OverflowError) as error:
        raise ValueError(f"not a dtype: {description!r}") from error
    if not _is_plain(dtype):
        raise ValueError(f"not a dtype of plain bytes: {description!r}")
    return dtype


def _is_plain(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in _KINDS and not dtype.hasobject and dtype.metadata is None


def _same(one: np.dtype[Any], other: np.dtype[Any]) -> bool:
    return one == other and one.type is other.type and one.itemsize == other.itemsize


def _as_lists(description: Any) -> Any:
    if isinstance(description, (tuple, list)):
        return [_as_lists(part) for part in description]
    return description


def _as_tuples(description: Any, depth: int) -> Any:
    """Undo `_as_lists`: fields are tuples of name (or title, name), dtype and shape."""
    if isinstance(description, str):
        return description
    if not isinstance(description, list) or depth > _MAX_DEPTH:
        raise ValueError(f"not a dtype: {description!r}")
    return [_field(part, depth) for part in description]


def _field(part: Any, depth: int) -> tuple[Any, ...]:
    if not isinstance(part, list) or len(part) not in (2, 3):
        raise ValueError(f"not a field of a dtype: {part!r}")
    name = tuple(part[0]) if isinstance(part[0], list) else part[0]
    return (name, _as_tuples(part[1], depth + 1), *(tuple(shape) for shape in part[2:]))
