"""What a manifest says of a file: its regions, each with a digest, of which some are tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unbroken.store.canonical import Json, MalformedError
from unbroken.store.digest import is_digest
from unbroken.store.fields import Fields
from unbroken.store.layout import is_file_name
from unbroken.store.safetensors import MAX_DIMENSIONS, bytes_of

MAX_REGIONS = 4_000_000


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
        """How messages call it: the path of the tensor, with the place of a shard in it."""
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
        >>> from unbroken.store.digest import digest_of
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
    place = fields.count("offset"), fields.count("nbytes"), read_digest(fields, "digest")
    if not fields.has("path"):
        fields.done()
        return Region(*place)
    tensor = fields.text("path"), fields.text("dtype"), fields.counts("shape", MAX_DIMENSIONS)
    part = _read_part(fields) if fields.has("offsets") else (None, None)
    fields.done()
    region = Region(*place, *tensor, *part)
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
