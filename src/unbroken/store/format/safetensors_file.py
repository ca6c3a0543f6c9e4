"""The layout of a safetensors file: 8 bytes of header length, a JSON header, the tensors.

Source: https://github.com/huggingface/safetensors#format. Within its freedom, this writer
starts the tensors at a multiple of 64 bytes, the widest types first and then by name, so that
each tensor stands aligned and equal states give equal files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from unbroken.errors import CaptureError
from unbroken.store.format.canonical_json import MAX_TEXT

# What a checkpoint stores, as the store sees it: named bytes with a shape.


@dataclass(frozen=True)
class Copied:
    """A copy of the bytes of a leaf.

    Attributes:
        memory: Memory that holds the copies of several leaves, as they will lie in their file.
        start: Where in it this one begins.
        digest: The digest of its bytes.
    """

    memory: memoryview
    start: int
    digest: str


class Leaf(Protocol):
    """Something whose bytes a checkpoint stores.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Plain:
        ...     path: str
        ...     file: str
        ...     name: str
        ...     dtype: str
        ...     shape: tuple[int, ...]
        ...     data: bytes
        ...     offsets: tuple[int, ...] | None = None
        ...     global_shape: tuple[int, ...] | None = None
        ...     copied: Copied | None = None
        ...     @property
        ...     def nbytes(self):
        ...         return len(self.data)
        ...     def chunks(self):
        ...         yield memoryview(self.data)
        >>> leaf: Leaf = Plain("model.w", "model.safetensors", "w", "U8", (2,), b"ab")
    """

    @property
    def path(self) -> str:
        """Where it belongs in the training state; unique, but for shards of one tensor."""
        ...

    @property
    def file(self) -> str:
        """The safetensors file it goes into."""
        ...

    @property
    def name(self) -> str:
        """Its key in that file."""
        ...

    @property
    def dtype(self) -> str:
        """The safetensors name of its type: "F32", "BF16", "U8", ..."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, or that of the shard; () for a scalar."""
        ...

    @property
    def offsets(self) -> tuple[int, ...] | None:
        """Of a shard, where it starts in the tensor, in elements by dimension; else None."""
        ...

    @property
    def global_shape(self) -> tuple[int, ...] | None:
        """Of a shard, the shape of the tensor; else None."""
        ...

    @property
    def copied(self) -> Copied | None:
        """Where its bytes lie copied and hashed, if they do; else the store asks for `chunks`."""
        ...

    @property
    def nbytes(self) -> int:
        """The length of its bytes."""
        ...

    def chunks(self) -> Iterator[memoryview]:
        """Yield its bytes in C order, little-endian, at most 16 MiB at a time."""
        ...


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

TORCH_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""By torch's name: the dtypes that every reader of safetensors files knows, as these call them."""


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
