"""A second reader of compressed files, written from docs/format.md alone.

It shares no code with unbroken: if the two disagree, the document or the code is wrong.
"""

from __future__ import annotations

import struct
import sys

import xxhash

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = bytes.fromhex("89 75 6e 62 72 6f 6b 65 6e 20 7a 73 74 64 0a 01")


def unpack_file(data: bytes) -> bytes:
    assert data[:16] == data[-16:] == MAGIC
    start, count, nbytes, checksum = struct.unpack("<QQQQ", data[-48:-16])
    assert start + 28 * count == len(data) - 48
    assert xxhash.xxh3_64_intdigest(data[start:-24]) == checksum
    plain = b"".join(unpack_chunk(data, *entry) for entry in entries(data[start:-48]))
    assert len(plain) == nbytes
    return plain


def entries(index: bytes):
    return struct.iter_unpack("<QIIIQ", index)


def unpack_chunk(data, offset, stored, nbytes, width, checksum) -> bytes:
    chunk = data[offset : offset + stored]
    assert xxhash.xxh3_64_intdigest(chunk) == checksum
    if width == 0:
        return chunk
    planes, place = [], 4 * width
    for number, length in enumerate(struct.unpack_from(f"<{width}I", chunk)):
        plane, place = chunk[place : place + length], place + length
        wanted = (nbytes - number + width - 1) // width
        planes.append(plane if length == wanted else zstd.decompress(plane))
    return bytes(planes[place % width][place // width] for place in range(nbytes))
