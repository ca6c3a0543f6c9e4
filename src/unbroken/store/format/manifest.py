"""The manifest: what a checkpoint consists of, down to the digest of every byte.

A checkpoint exists when its manifest stands in its folder under its final name; it is used
only when every byte matches. `docs/format.md` is the normative text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

from unbroken.errors import CaptureError, CorruptCheckpointError, NewerFormatError
from unbroken.store.format.canonical_json import (
    Fields,
    Json,
    MalformedError,
    digest_of,
    from_strict,
    is_digest,
    plain,
    spelled,
    to_canonical,
)
from unbroken.store.format.names import MANIFEST_NAME, MAX_STEP, is_file_name
from unbroken.store.format.safetensors_file import DTYPE_BITS, MAX_DIMENSIONS, bytes_of

FORMAT = "unbroken checkpoint"
VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
MAX_FILES = 100_000
MAX_REGIONS = 4_000_000
MAX_SHARDS = 100_000

_OPENING = b'{"digest":"'
_MIDDLE = b'","manifest":'
_CLOSING = b"}\n"
_BODY_AT = len(_OPENING) + 32 + len(_MIDDLE)


# Files and their regions, each with a digest; some regions are tensors.


@dataclass(frozen=True)
class Region:
    """A stretch of a file with its own digest: a tensor, a shard of one, or neither.

    Attributes:
        offset: Where it starts in the file, in bytes.
        nbytes: Its length in bytes.
        digest: The digest of its bytes.
        path: The path of the tensor in the training state; None if it is not a tensor.
        dtype: The safetensors name of the tensor's type.
        shape: The shape of the tensor, or of the shard.
        offsets: Of a shard, where it starts in the tensor, in elements by dimension; else None.
        global_shape: Of a shard, the shape of the tensor; else None.

    Example:
        >>> Region(0, 4, "0" * 32).path is None
        True
    """

    offset: int
    nbytes: int
    digest: str
    path: str | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None

    @property
    def name(self) -> str | None:
        """How messages call it: the path of the tensor, with the offsets of a shard in it."""
        if self.offsets is None:
            return self.path
        return f"{self.path} (shard at {', '.join(map(str, self.offsets))})"

    def to_json(self) -> dict[str, Json]:
        """Return the region as the manifest spells it."""
        plain: dict[str, Json] = {
            "digest": self.digest,
            "nbytes": self.nbytes,
            "offset": self.offset,
        }
        if self.path is not None:
            plain |= {"dtype": self.dtype, "path": self.path, "shape": self.shape}
        if self.offsets is not None:
            plain |= {"global_shape": self.global_shape, "offsets": self.offsets}
        return plain


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint. Its regions cover it whole, in order, without a gap.

    Attributes:
        name: Its name in the checkpoint folder.
        nbytes: Its length in bytes.
        regions: Its regions: of a safetensors file the header and each tensor, else a single one.

    Example:
        >>> from unbroken.store.format.canonical_json import digest_of
        >>> FileEntry("state.json", 2, (Region(0, 2, digest_of(b"{}")),)).has_tensors
        False
    """

    name: str
    nbytes: int
    regions: tuple[Region, ...]

    @property
    def has_tensors(self) -> bool:
        """Whether a region of it is a tensor."""
        return any(region.path is not None for region in self.regions)

    def to_json(self) -> dict[str, Json]:
        """Return the file as the manifest spells it."""
        regions: list[Json] = [region.to_json() for region in self.regions]
        return {"name": self.name, "nbytes": self.nbytes, "regions": regions}

    @staticmethod
    def from_json(item: Json) -> FileEntry:
        """Return the file that `item` describes; anything impossible is refused.

        Raises:
            MalformedError: No writer wrote this.
        """
        fields = Fields(item, "file")
        name, nbytes = fields.text("name"), fields.count("nbytes")
        if not is_file_name(name):
            raise MalformedError("lists a file that cannot stand in a checkpoint", found=repr(name))
        regions = tuple(_read_region(region) for region in fields.items("regions", MAX_REGIONS))
        fields.done()
        _check_tiling(name, nbytes, regions)
        return FileEntry(name, nbytes, regions)


def read_digest(fields: Fields, name: str) -> str:
    """Take a field that is a digest."""
    text = fields.text(name)
    if not is_digest(text):
        raise MalformedError(f"has an impossible {name!r}", "32 hexadecimal digits", repr(text))
    return text


def _read_region(item: Json) -> Region:
    fields = Fields(item, "region")
    stretch = fields.count("offset"), fields.count("nbytes"), read_digest(fields, "digest")
    if not fields.has("path"):
        fields.done()
        return Region(*stretch)
    tensor = fields.text("path"), fields.text("dtype"), fields.counts("shape", MAX_DIMENSIONS)
    part = _read_part(fields) if fields.has("offsets") else (None, None)
    fields.done()
    region = Region(*stretch, *tensor, *part)
    _check_tensor(region)
    return region


def _read_part(fields: Fields) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (
        fields.counts("offsets", MAX_DIMENSIONS),
        fields.counts("global_shape", MAX_DIMENSIONS),
    )


def _check_tensor(region: Region) -> None:
    """Hold the bytes of a tensor against its type and shape."""
    expected = bytes_of(region.dtype or "", region.shape or ())
    if expected != region.nbytes:
        what = f"{region.path} does not fit dtype {region.dtype} and shape {region.shape}"
        raise MalformedError(what, f"{expected} bytes", f"{region.nbytes} bytes")


def _check_tiling(name: str, nbytes: int, regions: Sequence[Region]) -> None:
    """Refuse a gap, an overlap or a tail that no digest covers."""
    end = 0
    for region in regions:
        if region.offset != end:
            raise MalformedError(f"{name} has a gap or an overlap", end, region.offset)
        end += region.nbytes
    if end != nbytes or not regions:
        raise MalformedError(f"{name} has regions that do not cover it", nbytes, end)


# Boxes: the part of a tensor that a shard holds, or that a reader wants.


@dataclass(frozen=True)
class Box:
    """A part of a tensor.

    Attributes:
        offsets: Where it starts, in elements, by dimension.
        shape: How far it goes, by dimension.

    Example:
        >>> Box((4, 0), (2, 3)).overlap(Box((5, 1), (9, 9)))
        Box(offsets=(5, 1), shape=(1, 2))
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box of a whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """How many elements are in it."""
        return math.prod(self.shape)

    @property
    def ends(self) -> tuple[int, ...]:
        """Where it ends, by dimension."""
        return tuple(at + size for at, size in zip(self.offsets, self.shape, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """Return what is in both; None if nothing is."""
        starts = tuple(map(max, zip(self.offsets, other.offsets, strict=True)))
        ends = tuple(map(min, zip(self.ends, other.ends, strict=True)))
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return None if any(size <= 0 for size in sizes) else Box(starts, sizes)


class ByteRun(NamedTuple):
    """Elements that lie together in two boxes: where in each, and how many."""

    source: int
    target: int
    length: int


def byte_runs(source: Box, target: Box) -> Iterator[ByteRun]:
    """Yield what to copy from one box to another, each in C order, by offset in the source.

    Example:
        >>> list(byte_runs(Box((0, 0), (2, 2)), Box((0, 1), (2, 3))))
        [ByteRun(source=1, target=0, length=1), ByteRun(source=3, target=3, length=1)]
        >>> list(byte_runs(Box((2, 0), (2, 3)), Box((0, 0), (9, 3))))
        [ByteRun(source=0, target=6, length=6)]
    """
    both = source.overlap(target)
    if both is None:
        return
    outer = _outer_dimensions(both, source, target)
    length = math.prod(both.shape[outer:])
    first = [_index(box, both.offsets) for box in (source, target)]
    strides = [_strides(box.shape)[:outer] for box in (source, target)]
    for index in product(*map(range, both.shape[:outer])):
        at = [start + _dot(index, steps) for start, steps in zip(first, strides, strict=True)]
        yield ByteRun(at[0], at[1], length)


def _outer_dimensions(both: Box, source: Box, target: Box) -> int:
    """Return how many leading dimensions have to be walked: the rest lies together."""
    outer = max(len(both.shape) - 1, 0)
    while outer and both.shape[outer] == source.shape[outer] == target.shape[outer]:
        outer -= 1
    return outer


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _index(box: Box, position: Sequence[int]) -> int:
    inside = [at - start for at, start in zip(position, box.offsets, strict=True)]
    return _dot(inside, _strides(box.shape))


def _dot(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(one, other, strict=True))


def fill(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Return whether the boxes cover a tensor of this shape, each element once.

    Example:
        >>> fill([Box((0,), (2,)), Box((2,), (1,))], (3,)), fill([Box((0,), (2,))], (3,))
        (True, False)
    """
    whole = Box.whole(shape)
    if any(len(box.offsets) != len(shape) or len(box.shape) != len(shape) for box in boxes):
        return False
    inside = all(box.overlap(whole) == box for box in boxes)
    return inside and sum(box.numel for box in boxes) == whole.numel and not _collide(boxes)


def _collide(boxes: Sequence[Box]) -> bool:
    """Return whether two boxes overlap; only those that may are compared."""
    if len(boxes) < 2:
        return False
    axis = max(range(len(boxes[0].shape)), key=lambda d: len({box.offsets[d] for box in boxes}))
    ordered = sorted(boxes, key=lambda box: (box.offsets[axis], box.offsets))
    active: list[Box] = []
    for box in ordered:
        active = [other for other in active if other.ends[axis] > box.offsets[axis]]
        if any(box.overlap(other) for other in active):
            return True
        active.append(box)
    return False


# Tensors as the files of a checkpoint hold them: whole, or in shards.


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
        shards: Its parts, by their offsets: together they cover it, each element once.

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
        for run in byte_runs(Box.whole(self.shape), box):
            source, at, length = (count * bits // 8 for count in run)
            target[at : at + length] = whole[source : source + length]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The boxes of its shards."""
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


# The manifest itself.


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        step: How many optimizer steps were completed.
        run_id: The run that wrote it.
        created: When, in UTC: "2026-01-31T12:00:00.000+00:00". For people; nothing depends on it.
        files: Its files, by name.
        facts: What else the writer wants known without reading a file.
        version: The version of the format.

    Example:
        >>> manifest = Manifest(10, "a" * 32, "2026-01-31T12:00:00.000+00:00", (), {})
        >>> Manifest.from_bytes(manifest.to_bytes(), "checkpoint-10") == manifest
        True
    """

    step: int
    run_id: str
    created: str
    files: tuple[FileEntry, ...]
    facts: Mapping[str, Json]
    version: int = VERSION

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor by its path: its type, its shape, and where its shards are."""
        return tensors_of(self.files)

    @cached_property
    def state_digest(self) -> str:
        """One digest for the whole state: equal for equal tensors and equal other files.

        It depends neither on which file holds a tensor or shard nor on when or by whom it was
        written; but on how a tensor is sharded.
        """
        tensors: dict[str, Json] = {
            path: [tensor.dtype, tensor.shape, tensor.described]
            for path, tensor in self.tensors.items()
        }
        others: dict[str, Json] = {
            file.name: [region.digest for region in file.regions]
            for file in self.files
            if not file.has_tensors
        }
        return digest_of(spelled({"files": others, "tensors": tensors}))

    @property
    def nbytes(self) -> int:
        """The bytes of all files together, without the manifest's own."""
        return sum(file.nbytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the manifest as its file holds it, its own digest in front."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        facts = plain(self.facts, "manifest.facts")  # of all else it is known what it is
        body = spelled({**self._to_json(), "facts": facts})
        return b"".join((_OPENING, digest_of(body).encode(), _MIDDLE, body, _CLOSING))

    @staticmethod
    def from_bytes(raw: bytes, where: str) -> Manifest:
        """Return the manifest that `raw` holds; any other spelling of it is refused.

        Args:
            raw: The whole file.
            where: How messages call it.

        Raises:
            CorruptCheckpointError: The bytes are not those that a writer wrote.
            NewerFormatError: A newer version of unbroken wrote them.
        """
        try:
            fields = Fields(from_strict(_checked_body(raw)), "manifest")
            _check_version(fields, where)
            manifest, state_digest = _read_manifest(fields)
            spelled_again = manifest.to_bytes()
        except CaptureError as error:  # facts that no writer can have been given
            raise CorruptCheckpointError(where, f"{error.where[:80]}: {error.what}") from None
        except MalformedError as error:
            raise CorruptCheckpointError(
                where, error.what, expected=error.expected, found=error.found
            ) from None
        if manifest.state_digest != state_digest or spelled_again != raw:
            raise CorruptCheckpointError(where, "is not spelled as the format asks")
        return manifest

    def _to_json(self) -> dict[str, Json]:
        files: list[Json] = [file.to_json() for file in self.files]
        return {
            "created": self.created,
            "files": files,
            "format": FORMAT,
            "run_id": self.run_id,
            "state_digest": self.state_digest,
            "step": self.step,
            "version": self.version,
        }


def refuse_too_large(facts: Mapping[str, Json], files: Sequence[FileEntry], nbytes: int) -> None:
    """Raise where a manifest would be larger than any reader takes.

    Args:
        facts: What it holds of facts.
        files: What it holds of files.
        nbytes: How long it is, or will be at least.

    Raises:
        CaptureError: It says what takes the room, and what to do.
    """
    if nbytes <= MAX_MANIFEST_BYTES and len(files) <= MAX_FILES:
        return
    by_name = {name: least_nbytes(value) for name, value in facts.items()}
    largest = sorted(by_name, key=lambda name: -by_name[name])[:3]
    shown = ", ".join(f"{name} {_in_mib(by_name[name])}" for name in largest)
    regions = sum(len(file.regions) for file in files)
    found = f"{_in_mib(nbytes)} (facts {_in_mib(sum(by_name.values()))}: {shown or 'none'}"
    raise CaptureError(
        MANIFEST_NAME,
        "would be larger than any reader takes: nothing was committed",
        expected=f"at most {_in_mib(MAX_MANIFEST_BYTES)} and {MAX_FILES} files",
        found=f"{found}; {len(files)} files with {regions} tensors)",
        hint="give long values as `values` or in an object's state, not as facts or settings; "
        "put very many small tensors together into few",
    )


def least_nbytes(value: object) -> int:
    """Return how many bytes a value takes in a manifest, or somewhat less; quickly."""
    try:
        return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    except (TypeError, ValueError, RecursionError):  # what cannot be stored is refused elsewhere
        return 0


def _in_mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.0f} MiB"


def _checked_body(raw: bytes) -> bytes:
    """Return the bytes between the envelope's fixed parts, if the digest in front is theirs."""
    body = raw[_BODY_AT : -len(_CLOSING)]
    envelope = (raw[: len(_OPENING)], raw[_BODY_AT - len(_MIDDLE) : _BODY_AT], raw[-2:])
    if envelope != (_OPENING, _MIDDLE, _CLOSING):
        raise MalformedError("is not a whole manifest", found=f"{len(raw)} bytes")
    expected, found = raw[len(_OPENING) : len(_OPENING) + 32], digest_of(body).encode()
    if expected != found:
        raise MalformedError("is damaged", f"digest {expected!r}", f"digest {found!r}")
    return body


def _check_version(fields: Fields, where: str) -> None:
    """Refuse another format, before anything is read that may differ in it."""
    form, version = fields.text("format"), fields.count("version")
    if form != FORMAT:
        raise MalformedError("is of another format", FORMAT, form[:100])
    if version > VERSION:
        expected, hint = f"at most version {VERSION}", "upgrade unbroken to read this checkpoint"
        raise NewerFormatError(
            where, "has a newer format", expected=expected, found=version, hint=hint
        )
    if version < 1:
        raise MalformedError("has an impossible version", "1 or more", version)


def _read_manifest(fields: Fields) -> tuple[Manifest, str]:
    state_digest = read_digest(fields, "state_digest")
    facts = fields.value("facts")
    if not isinstance(facts, dict):
        raise MalformedError("has facts that are not an object", found=type(facts).__name__)
    manifest = Manifest(
        step=fields.count("step", MAX_STEP),
        run_id=fields.text("run_id"),
        created=fields.text("created"),
        files=tuple(FileEntry.from_json(item) for item in fields.items("files", MAX_FILES)),
        facts=facts,
    )
    fields.done()
    _check_names(manifest.files)
    manifest.tensors  # noqa: B018 (raises where tensors are there twice, or in part)
    return manifest, state_digest


def _check_names(files: Sequence[FileEntry]) -> None:
    """Refuse what is listed twice, also for a file system that ignores case."""
    names = [file.name for file in files]
    if names != sorted(names) or len({name.casefold() for name in names}) < len(names):
        raise MalformedError("lists a file twice, or out of order")
