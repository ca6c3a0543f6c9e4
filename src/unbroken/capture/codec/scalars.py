"""Scalars as JSON, and back: every bit, every digit, and the exact type."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from unbroken.capture.tensors import DTYPES, dtype_name
from unbroken.errors import CaptureError
from unbroken.store.format.typed_json import (
    EXACT_INT,
    TAG,
    Json,
    get,
    get_bytes,
    get_numbers,
    hex_int,
    malformed,
)

# NumPy arrays and scalars: their dtypes as JSON, their bytes as leaves.


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


_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_MEMORY_FORMATS = {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.memory_format)
}


def is_text(value: str) -> bool:
    """Return whether UTF-8 can hold the string: it has no lone surrogates."""
    return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)


def encode_int(value: int) -> Json:
    """Return the integer itself, or its hexadecimal digits where JSON readers would round it."""
    return int(value) if abs(value) < EXACT_INT else {TAG: "int", "hex": hex(value)}


def _encode_float(value: float, _path: str) -> Json:
    return value if math.isfinite(value) else {TAG: "float", "bits": struct.pack(">d", value).hex()}


def _encode_complex(value: complex, _path: str) -> Json:
    return {TAG: "complex", "bits": struct.pack(">dd", value.real, value.imag).hex()}


def _encode_str(value: str) -> Json:
    if is_text(value):
        return value
    return {TAG: "str", "hex": value.encode("utf-8", "surrogatepass").hex()}


def _encode_name(tag: str) -> Callable[[Any, str], Json]:
    return lambda value, _: {TAG: tag, "name": str(value)}


def encode_dtype(dtype: np.dtype[Any], path: str) -> Json:
    """Return the description of a NumPy dtype, or raise for the value at `path` that has it."""
    try:
        return describe_dtype(dtype)
    except ValueError as error:
        found = f"a NumPy value of dtype {dtype}"
        raise CaptureError(path, "cannot be stored", found=found, hint=str(error)) from error


def _encode_numpy(value: np.generic, path: str) -> Json:
    description = encode_dtype(value.dtype, path)
    return {TAG: "numpy.scalar", "dtype": description, "hex": value.tobytes().hex()}


def _decode_doubles(node: Json, path: str, count: int) -> tuple[float, ...]:
    raw = get_bytes(node, "bits", path)
    if len(raw) != 8 * count:
        raise malformed(path, "not the bits of a number")
    return struct.unpack(f">{count}d", raw)


def _decode_str(node: Json, path: str) -> str:
    try:
        return get_bytes(node, "hex", path).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise malformed(path, "not UTF-8") from error


def _decode_numpy_str(node: Json, path: str) -> np.str_:
    value = node.get("value")
    return np.str_(
        _decode_str(value, path) if isinstance(value, dict) else get(node, "value", str, path)
    )


def _decode_named(choices: Mapping[str, Any]) -> Callable[[Json, str], Any]:
    def decode(node: Json, path: str) -> Any:
        name = get(node, "name", str, path)
        if name not in choices:
            raise malformed(path, "a name that this torch does not know", name)
        return choices[name]

    return decode


def decode_device(node: Json, key: str, path: str) -> torch.device:
    """Return the device that the field names."""
    name = get(node, key, str, path)
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise malformed(path, "not a device", name) from error


def decode_dtype(node: Json, path: str) -> np.dtype[Any]:
    """Return the NumPy dtype that the field "dtype" describes."""
    try:
        return read_dtype(node.get("dtype"))
    except ValueError as error:
        raise malformed(path, "not a NumPy dtype", node.get("dtype")) from error


def _decode_numpy(node: Json, path: str) -> Any:
    dtype = decode_dtype(node, path)
    raw = bytearray(get_bytes(node, "hex", path))
    if len(raw) != dtype.itemsize:
        raise malformed(path, "not the bytes of a scalar")
    return np.ndarray((), dtype, buffer=raw)[()]


class Scalar(NamedTuple):
    """How one kind of scalar is written and read."""

    types: tuple[type, ...]
    encode: Callable[[Any, str], Json]
    decode: Callable[[Json, str], Any]


SCALARS: Mapping[str, Scalar] = {
    "int": Scalar((int,), lambda value, _: encode_int(value), hex_int),
    "float": Scalar((float,), _encode_float, lambda node, path: _decode_doubles(node, path, 1)[0]),
    "complex": Scalar(
        (complex,), _encode_complex, lambda node, path: complex(*_decode_doubles(node, path, 2))
    ),
    "str": Scalar((str,), lambda value, _: _encode_str(value), _decode_str),
    "torch.dtype": Scalar(
        (torch.dtype,),
        lambda value, _: {TAG: "torch.dtype", "name": dtype_name(value)},
        _decode_named(DTYPES),
    ),
    "torch.layout": Scalar((torch.layout,), _encode_name("torch.layout"), _decode_named(_LAYOUTS)),
    "torch.memory_format": Scalar(
        (torch.memory_format,),
        _encode_name("torch.memory_format"),
        _decode_named(_MEMORY_FORMATS),
    ),
    "torch.device": Scalar(
        (torch.device,),
        _encode_name("torch.device"),
        lambda node, path: decode_device(node, "name", path),
    ),
    "torch.Size": Scalar(
        (torch.Size,),
        lambda value, _: {TAG: "torch.Size", "items": [*value]},
        lambda node, path: torch.Size(get_numbers(node, "items", path)),
    ),
    "numpy.dtype": Scalar(
        (),
        lambda value, path: {TAG: "numpy.dtype", "dtype": encode_dtype(value, path)},
        decode_dtype,
    ),
    "numpy.scalar": Scalar((), _encode_numpy, _decode_numpy),
    "numpy.str_": Scalar(
        (np.str_,),
        lambda value, _: {TAG: "numpy.str_", "value": _encode_str(str(value))},
        _decode_numpy_str,
    ),
    "numpy.bytes_": Scalar(
        (np.bytes_,),
        lambda value, _: {TAG: "numpy.bytes_", "hex": bytes(value).hex()},
        lambda node, path: np.bytes_(get_bytes(node, "hex", path)),
    ),
}
"""By tag: how a scalar is written and read; those that JSON has are written without one."""

ENCODE: Mapping[type, Callable[[Any, str], Json]] = {
    type(None): lambda value, _: value,
    bool: lambda value, _: value,
    **{kind: scalar.encode for scalar in SCALARS.values() for kind in scalar.types},
}
"""By exact type: how a scalar is written."""
