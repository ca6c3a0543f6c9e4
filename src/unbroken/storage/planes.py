"""Chunks of bytes, made smaller without loss: byte planes, and zstd behind them.

The numbers of one tensor are alike in their highest byte (sign and exponent) and noise in their
lowest. So all first bytes are packed together, then all second ones, and so on; a plane that does
not get smaller is kept as it is.
"""

from __future__ import annotations

import importlib
import struct
import sys
from typing import Any

from unbroken.errors import ConfigError

WIDTHS = (1, 2, 4, 8)  # bytes of one number
AS_IT_IS = 0  # in place of a width: a chunk that does not get smaller
_LEVEL = 1  # a higher one looks for repeated text, of which weights have none
_SAMPLE_BYTES = 32 << 10
_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def load_zstd(where: str) -> Any:
    """Return the library of zstd.

    Args:
        where: What needs it, for the message.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        hint = "pip install 'unbroken[zstd]'"
        raise ConfigError(where, f"compressed files need {_MODULE}", hint=hint) from None


def pack(chunk: bytes, zstd: Any) -> tuple[int, bytes]:
    """Return a chunk made smaller, and the width of its numbers; or `AS_IT_IS` and the chunk.

    Example:
        >>> zstd = load_zstd("here")
        >>> chunk = struct.pack("<1000f", *(number / 7 for number in range(1000)))
        >>> width, packed = pack(chunk, zstd)
        >>> width, len(packed) < 3500, unpack(width, packed, len(chunk), zstd) == chunk
        (4, True, True)
    """

    def packed_planes(data: bytes, width: int) -> list[bytes]:
        planes = [data[place::width] for place in range(width)]
        return [min(plane, zstd.compress(plane, _LEVEL), key=len) for plane in planes]

    start = len(chunk) // 2 & -max(WIDTHS)
    sample = chunk[start : start + _SAMPLE_BYTES]
    doubt = len(sample) >> 9  # more planes must pay: of equal ones, the sample tells little
    width = min(WIDTHS, key=lambda one: sum(map(len, packed_planes(sample, one))) + one * doubt)
    planes = packed_planes(chunk, width)
    packed = struct.pack(f"<{width}I", *map(len, planes)) + b"".join(planes)
    return (width, packed) if len(packed) < len(chunk) else (AS_IT_IS, chunk)


def unpack(width: int, packed: bytes, nbytes: int, zstd: Any) -> bytearray:
    """Return the chunk of `nbytes` bytes that was packed.

    Raises:
        ValueError: These bytes are no such chunk.
    """
    if width == AS_IT_IS:
        planes = [packed]
    else:
        end = 4 * width
        lengths = struct.unpack(f"<{width}I", packed[:end]) if len(packed) >= end else ()
        planes = []
        for place, length in enumerate(lengths):
            plane, end = packed[end : end + length], end + length
            planes.append(_unpack_plane(plane, len(range(place, nbytes, width)), zstd))
    if sum(map(len, planes)) != nbytes:
        raise ValueError(f"expected {nbytes} bytes, found {sum(map(len, planes))}")
    chunk = bytearray(nbytes)
    for place, plane in enumerate(planes):
        chunk[place :: len(planes)] = plane
    return chunk


def _unpack_plane(plane: bytes, nbytes: int, zstd: Any) -> bytes:
    if len(plane) == nbytes:  # it did not get smaller
        return plane
    reader = zstd.ZstdDecompressor()
    try:
        plain: bytes = reader.decompress(plane, nbytes + 1)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(plain) != nbytes or not reader.eof:
        raise ValueError(f"expected a plane of {nbytes} bytes, found {len(plain)}")
    return plain
