"""The manifest: what a checkpoint consists of, down to the digest of every byte.

A checkpoint exists when its manifest stands in its folder under its final name; it is used
only when every byte matches. `docs/format.md` is the normative text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from unbroken.errors import CaptureError, CorruptCheckpointError, NewerFormatError
from unbroken.store.format.canonical_json import (
    Fields,
    Json,
    MalformedError,
    from_strict,
    plain,
    spelled,
)
from unbroken.store.format.digest import digest_of
from unbroken.store.format.entries import FileEntry as FileEntry
from unbroken.store.format.entries import Region as Region
from unbroken.store.format.entries import TensorEntry, read_digest, tensors_of
from unbroken.store.format.names import MANIFEST_NAME, MAX_STEP

FORMAT = "unbroken checkpoint"
VERSION = 1
MAX_MANIFEST_BYTES = 256 << 20
MAX_FILES = 100_000

_OPENING = b'{"digest":"'
_MIDDLE = b'","manifest":'
_CLOSING = b"}\n"
_BODY_AT = len(_OPENING) + 32 + len(_MIDDLE)


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
        written; but on how a tensor is cut.
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
    except (TypeError, ValueError, RecursionError):  # what cannot be stored is told elsewhere
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
