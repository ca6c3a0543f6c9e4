"""What a checkpoint stores, as the store sees it: named bytes with a shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


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
