"""`unbroken verify`: every byte of the checkpoints against their manifests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from unbroken.cli.run_paths import Place, open_place
from unbroken.cli.tables import make_console, print_json, size_text
from unbroken.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NewerFormatError,
    UnbrokenError,
)
from unbroken.store import CheckpointReader, Damage
from unbroken.store.format.names import MANIFEST_NAME


@dataclass(frozen=True)
class Verdict:
    """What reading a checkpoint whole has shown.

    Attributes:
        folder: Its folder.
        damage: All that is wrong with it.
        nbytes: How many bytes were promised; None if the manifest cannot be read.
        files: How many files were promised.
        tensors: How many tensors were promised.
        is_newer: Whether only a newer version can read it; that is no damage.
    """

    folder: str
    damage: tuple[Damage, ...]
    nbytes: int | None = None
    files: int = 0
    tensors: int = 0
    is_newer: bool = False

    @property
    def is_intact(self) -> bool:
        """Whether every promised byte is there; a stray file harms nobody."""
        return not self.is_newer and all(damage.kind == "stray" for damage in self.damage)


def print_verdicts(path: str, *, step: int | None, as_json: bool) -> int:
    """Verify the checkpoints at a path, print all that is wrong, and return the exit status.

    Raises:
        CheckpointNotFoundError: There is no checkpoint.
        RunDirectoryError: The path names no run and no checkpoint.
    """
    place = open_place(path)
    if step is not None:
        place = place.narrowed(step)
    if not place.folders:
        raise CheckpointNotFoundError(path, "there is no checkpoint yet")
    if as_json:
        verdicts = list(verify(place))
        print_json({"path": str(place.path), "checkpoints": [_as_json(one) for one in verdicts]})
    else:
        verdicts = _print_as_found(place)
    return _status(verdicts)


def verify(place: Place) -> Iterator[Verdict]:
    """Yield the verdict on each checkpoint that a place names."""
    for folder in place.folders:
        yield _verdict(place, folder)


def _verdict(place: Place, folder: str) -> Verdict:
    problem: CheckpointError | None = None
    try:
        storage = place.open(folder).storage
    except NewerFormatError as error:
        return Verdict(folder, (_of_manifest(error),), is_newer=True)
    except CheckpointError as error:
        storage, problem = place.storage, error
    try:
        reader = _EagerReader(storage, folder)
    except CheckpointError as error:
        return Verdict(folder, (_of_manifest(error),))
    damage = reader.verify()
    if problem is not None and not damage:  # whole, but of another step or run than its place
        damage.append(_of_manifest(problem))
    manifest = reader.manifest
    counts = (manifest.nbytes, len(manifest.files), len(manifest.tensors))
    return Verdict(folder, tuple(damage), *counts)


class _EagerReader(CheckpointReader):
    """A reader that opens whatever has a manifest: with one file missing, the rest is read too."""

    def _check_sizes(self) -> None:
        """Leave the sizes to `verify`, which does not stop at the first wrong one."""


def _of_manifest(error: CheckpointError) -> Damage:
    sentence = UnbrokenError("", error.what, expected=error.expected, found=error.found)
    return Damage(MANIFEST_NAME, "unreadable", None, str(sentence))


def _print_as_found(place: Place) -> list[Verdict]:
    """Print each verdict as soon as it is known: reading large checkpoints takes its time."""
    console = make_console()
    verdicts = []
    for verdict in verify(place):
        verdicts.append(verdict)
        console.print(f"{verdict.folder}: {_words(verdict)}")
        for damage in verdict.damage:
            console.print(f"  {damage}")
        console.file.flush()
    bad = [verdict.folder for verdict in verdicts if not verdict.is_intact]
    if bad:
        console.print(f"not usable: {len(bad)} of {len(verdicts)}: {', '.join(bad)}")
    else:
        console.print(f"all intact: {len(verdicts)} of {len(verdicts)}")
    return verdicts


def _words(verdict: Verdict) -> str:
    if verdict.is_newer:
        return "of a newer format"
    if not verdict.is_intact:
        return "damaged"
    size = size_text(verdict.nbytes or 0)
    return f"intact: {size}, {verdict.files} files, {verdict.tensors} tensors: every byte matches"


def _as_json(verdict: Verdict) -> dict[str, object]:
    return {**asdict(verdict), "is_intact": verdict.is_intact}


def _status(verdicts: list[Verdict]) -> int:
    if any(not verdict.is_intact and not verdict.is_newer for verdict in verdicts):
        return CorruptCheckpointError.exit_code
    return NewerFormatError.exit_code if any(one.is_newer for one in verdicts) else 0
