"""The manifest: what a checkpoint consists of, down to the digest of every byte.

A checkpoint exists when its manifest stands in its folder under its final name; it is used
only when every byte matches. `docs/format.md` is the normative text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from unbroken.errors import CorruptCheckpointError, NewerFormatError
from unbroken.store.canonical import Json, MalformedError, from_strict, to_canonical
from unbroken.store.digest import digest_of, is_digest
from unbroken.store.fields import Fields
from unbroken.store.layout import MAX_STEP, is_file_name
from unbroken.store.safetensors import MAX_DIMENSIONS, bytes_of

FORMAT = "unbroken checkpoint"
VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
MAX_FILES = 100_000
MAX_REGIONS = 4_000_000

_OPENING = b'{"digest":"'
_MIDDLE = b'","manifest":'
_CLOSING = b"}\n"
_BODY_AT = len(_OPENING) + 32 + len(_MIDDLE)


@dataclass(frozen=True)
class Region:
    """A stretch of a file with its own digest: one tensor, or what is not a tensor.

    Attributes:
        offset: Where it starts in the file, in bytes.
        nbytes: Its length in bytes.
        digest: The digest of its bytes.
        path: The path of the tensor in the training state; None if it is not a tensor.
        dtype: The safetensors name of the tensor's type.
        shape: The tensor's shape.

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

    def to_json(self) -> dict[str, Json]:
        """Return the region as the manifest spells it."""
        plain: dict[str, Json] = {
            "digest": self.digest,
            "nbytes": self.nbytes,
            "offset": self.offset,
        }
        if self.path is not None:
            plain |= {"dtype": self.dtype, "path": self.path, "shape": self.shape}
        return plain


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint. Its regions cover it whole, in order, without a gap.

    Attributes:
        name: Its name in the checkpoint folder.
        nbytes: Its length in bytes.
        regions: Its regions: of a safetensors file the header and each tensor, else a single one.

    Example:
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
    def tensors(self) -> Mapping[str, tuple[str, Region]]:
        """The file and region of every tensor, by its path."""
        return {
            region.path: (file.name, region)
            for file in self.files
            for region in file.regions
            if region.path is not None
        }

    @cached_property
    def state_digest(self) -> str:
        """One digest for the whole state: equal for equal tensors and equal other files.

        It depends neither on which file holds a tensor nor on when or by whom it was written.
        """
        tensors = {
            path: [region.dtype, region.shape, region.digest]
            for path, (_, region) in self.tensors.items()
        }
        others = {
            file.name: [region.digest for region in file.regions]
            for file in self.files
            if not file.has_tensors
        }
        return digest_of(to_canonical({"files": others, "tensors": tensors}))

    @property
    def nbytes(self) -> int:
        """The bytes of all files together, without the manifest's own."""
        return sum(file.nbytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Return the manifest as its file holds it, its own digest in front."""
        body = to_canonical(self._to_json(), "manifest")
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
        except MalformedError as error:
            raise CorruptCheckpointError(
                where, error.what, expected=error.expected, found=error.found
            ) from None
        if manifest.state_digest != state_digest or manifest.to_bytes() != raw:
            raise CorruptCheckpointError(where, "is not spelled as the format asks")
        return manifest

    def _to_json(self) -> dict[str, Json]:
        files: list[Json] = [
            {
                "name": file.name,
                "nbytes": file.nbytes,
                "regions": [region.to_json() for region in file.regions],
            }
            for file in self.files
        ]
        return {
            "created": self.created,
            "facts": self.facts,
            "files": files,
            "format": FORMAT,
            "run_id": self.run_id,
            "state_digest": self.state_digest,
            "step": self.step,
            "version": self.version,
        }


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
    state_digest = _digest(fields, "state_digest")
    facts = fields.value("facts")
    if not isinstance(facts, dict):
        raise MalformedError("has facts that are not an object", found=type(facts).__name__)
    manifest = Manifest(
        step=fields.count("step", MAX_STEP),
        run_id=fields.text("run_id"),
        created=fields.text("created"),
        files=tuple(_read_file(item) for item in fields.items("files", MAX_FILES)),
        facts=facts,
    )
    fields.done()
    _check_names(manifest.files)
    return manifest, state_digest


def _read_file(item: Json) -> FileEntry:
    fields = Fields(item, "file")
    name, nbytes = fields.text("name"), fields.count("nbytes")
    if not is_file_name(name):
        raise MalformedError("lists a file that cannot stand in a checkpoint", found=repr(name))
    regions = tuple(_read_region(region) for region in fields.items("regions", MAX_REGIONS))
    fields.done()
    _check_tiling(name, nbytes, regions)
    return FileEntry(name, nbytes, regions)


def _read_region(item: Json) -> Region:
    fields = Fields(item, "region")
    region = Region(fields.count("offset"), fields.count("nbytes"), _digest(fields, "digest"))
    if fields.has("path"):
        region = replace(
            region,
            path=fields.text("path"),
            dtype=fields.text("dtype"),
            shape=fields.counts("shape", MAX_DIMENSIONS),
        )
        _check_tensor(region)
    fields.done()
    return region


def _digest(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if not is_digest(text):
        raise MalformedError(f"has an impossible {name!r}", "32 hexadecimal digits", repr(text))
    return text


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


def _check_names(files: Sequence[FileEntry]) -> None:
    """Refuse what is listed twice, also for a file system that ignores case."""
    names = [file.name for file in files]
    if names != sorted(names) or len({name.casefold() for name in names}) < len(names):
        raise MalformedError("lists a file twice, or out of order")
    paths = [region.path for file in files for region in file.regions if region.path is not None]
    if len(set(paths)) < len(paths):
        raise MalformedError("lists a tensor twice")
