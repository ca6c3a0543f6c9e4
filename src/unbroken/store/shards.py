"""Tensors as the files of a checkpoint hold them: whole, or in shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from unbroken.store.boxes import Box, fill, runs
from unbroken.store.canonical import Json, MalformedError, to_canonical
from unbroken.store.digest import digest_of
from unbroken.store.regions import FileEntry, Region
from unbroken.store.safetensors import DTYPE_BITS, bytes_of

MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Shard:
    """A stored part of a tensor; all of it, for a tensor that is stored whole.

    Attributes:
        file: The file that it stands in.
        number: Which region of that file it is.
        box: Which part of the tensor it is.
        digest: The digest of its bytes.
    """

    file: str
    number: int
    box: Box
    digest: str


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a checkpoint.

    Attributes:
        path: Its path in the training state.
        dtype: The safetensors name of its type.
        shape: Its shape.
        shards: Its parts, by their place in it: together they cover it, each element once.

    Example:
        >>> shard = Shard("model.safetensors", 1, Box((0,), (2,)), "0" * 32)
        >>> entry = TensorEntry("model.w", "F32", (2,), (shard,))
        >>> entry.nbytes, entry.is_whole, entry.digest == shard.digest
        (8, True, True)
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it is stored in one piece."""
        return self.shards[0].box.shape == self.shape

    @property
    def nbytes(self) -> int:
        """The length of all its bytes."""
        return bytes_of(self.dtype, self.shape) or 0

    @property
    def digest(self) -> str:
        """The digest of its bytes; of a tensor in shards, that of `described`."""
        described = self.described
        return described if isinstance(described, str) else digest_of(to_canonical(described, ""))

    @property
    def described(self) -> Json:
        """What the state digest says of its bytes: a digest, or what each shard is."""
        if self.is_whole:
            return self.shards[0].digest
        return [[[*s.box.offsets], [*s.box.shape], s.digest] for s in self.shards]

    def cut_out(self, box: Box, whole: memoryview, target: memoryview) -> None:
        """Copy the bytes of a part out of those of the whole tensor, both in C order.

        Example:
            >>> part = memoryview(bytearray(1))
            >>> entry = TensorEntry("model.w", "U8", (2,), ())
            >>> entry.cut_out(Box((1,), (1,)), memoryview(b"ab"), part)
            >>> bytes(part)
            b'b'
        """
        bits = DTYPE_BITS[self.dtype]
        for run in runs(Box.whole(self.shape), box):
            source, at, length = (count * bits // 8 for count in run)
            target[at : at + length] = whole[source : source + length]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """How it is cut."""
        return tuple(shard.box for shard in self.shards)


def tensors_of(files: Iterable[FileEntry]) -> dict[str, TensorEntry]:
    """Return all tensors by their paths, in the order in which the files hold them.

    Raises:
        MalformedError: One is there twice, or its shards do not make it up.
    """
    found: dict[str, list[tuple[str, int, Region]]] = {}
    for file in files:
        for number, region in enumerate(file.regions):
            if region.path is not None:
                found.setdefault(region.path, []).append((file.name, number, region))
    return {path: _tensor(path, parts) for path, parts in found.items()}


def _tensor(path: str, parts: list[tuple[str, int, Region]]) -> TensorEntry:
    first = parts[0][2]
    dtype = first.dtype or ""
    if first.offsets is None:
        if len(parts) > 1:
            raise MalformedError("lists a tensor twice", found=path)
        shape = first.shape or ()
        whole = Shard(*parts[0][:2], Box.whole(shape), first.digest)
        return TensorEntry(path, dtype, shape, (whole,))
    shards = [_shard(*part) for part in parts]
    shards.sort(key=lambda shard: shard.box.offsets)
    shape = first.global_shape or ()
    _check(path, first, [region for *_, region in parts])
    if not fill([shard.box for shard in shards], shape):
        raise MalformedError(f"{path} has shards that do not make it up", found=f"{len(shards)}")
    return TensorEntry(path, dtype, shape, tuple(shards))


def _shard(file: str, number: int, region: Region) -> Shard:
    return Shard(file, number, Box(region.offsets or (), region.shape or ()), region.digest)


def _check(path: str, first: Region, regions: list[Region]) -> None:
    """Refuse shards of several tensors, too many, and one that is all of its tensor."""
    kinds: Mapping[object, None] = dict.fromkeys((one.dtype, one.global_shape) for one in regions)
    if len(kinds) > 1 or any(region.offsets is None for region in regions):
        raise MalformedError(f"{path} has shards of different tensors")
    if not 1 < len(regions) <= MAX_SHARDS or not math.prod(first.global_shape or ()):
        raise MalformedError(f"{path} has an impossible number of shards", found=len(regions))
