"""The layout of a safetensors file: 8 bytes of header length, a JSON header, the tensors.

Source: https://github.com/huggingface/safetensors#format. Within its freedom, this writer
starts the tensors at a multiple of 64 bytes, the widest types first and then by name, so that
each tensor stands aligned and equal states give equal files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from unbroken.errors import CaptureError
from unbroken.store.fields import MAX_TEXT
from unbroken.store.leaf import Leaf

MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
MAX_DIMENSIONS = 64
_ALIGNMENT = 64

DTYPE_BITS = {
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "BF16": 16, "F16": 16, "I16": 16, "U16": 16,
    "BOOL": 8, "I8": 8, "U8": 8,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


def bytes_of(dtype: str, shape: Sequence[int]) -> int | None:
    """Return how many bytes a tensor takes, or None if it cannot exist.

    Args:
        dtype: A safetensors type name.
        shape: The lengths of its dimensions.

    Example:
        >>> bytes_of("BF16", (3, 5)), bytes_of("F4", (3,)), bytes_of("F33", ())
        (30, None, None)
    """
    if dtype not in DTYPE_BITS or len(shape) > MAX_DIMENSIONS:
        return None
    whole, odd = divmod(math.prod(shape) * DTYPE_BITS[dtype], 8)
    return None if odd else whole


def in_file_order(leaves: Sequence[Leaf]) -> list[Leaf]:
    """Return the leaves of one file in the order in which it holds them."""
    return sorted(leaves, key=lambda leaf: (-DTYPE_BITS.get(leaf.dtype, 0), leaf.name))


def header_of(leaves: Sequence[Leaf]) -> bytes:
    """Return all bytes before the first tensor, padded so that it starts 64-byte aligned.

    Args:
        leaves: The leaves of one file, in file order.

    Raises:
        CaptureError: A name, type, shape or length is one that the format cannot hold.
    """
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for leaf in leaves:
        _check(leaf, described)
        end = offset + leaf.nbytes
        described[leaf.name] = {
            "dtype": leaf.dtype,
            "shape": list(leaf.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(padded) > MAX_HEADER_BYTES:
        raise CaptureError(leaves[0].file, "has too many tensors for one file", found=len(leaves))
    return len(padded).to_bytes(8, "little") + padded


def _check(leaf: Leaf, described: dict[str, object]) -> None:
    if leaf.name in described or not leaf.name:
        raise CaptureError(leaf.path, f"{leaf.file} cannot hold another {leaf.name!r}")
    if len(leaf.path) > MAX_TEXT:
        found = f"{len(leaf.path)} characters"
        what, expected_length = "is too long a path for a manifest", f"at most {MAX_TEXT}"
        raise CaptureError(leaf.path[:200], what, expected=expected_length, found=found)
    expected = bytes_of(leaf.dtype, leaf.shape)
    if expected is None or expected != leaf.nbytes:
        shape = list(leaf.shape)
        what = f"has bytes that do not fit dtype {leaf.dtype} and shape {shape}"
        raise CaptureError(leaf.path, what, expected=expected, found=leaf.nbytes)
