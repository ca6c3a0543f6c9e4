"""`unbroken verify`: every byte of the checkpoints against their manifests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from unbroken.cli.run_paths import RunPath, open_run_path
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
class VerifyResult:
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


def print_results(path: str, *, step: int | None, as_json: bool) -> int:
    """Verify the checkpoints at a path, print all that is wrong, and return the exit status.

    Raises:
        CheckpointNotFoundError: There is no checkpoint.
        RunDirectoryError: The path names no run and no checkpoint.
    """
    run_path = open_run_path(path)
    if step is not None:
        run_path = run_path.narrowed(step)
    if not run_path.folders:
        raise CheckpointNotFoundError(path, "there is no checkpoint yet")
    if as_json:
        results = list(verify(run_path))
        print_json({"path": str(run_path.path), "checkpoints": [_as_json(one) for one in results]})
    else:
        results = _print_as_found(run_path)
    return _status(results)


def verify(run_path: RunPath) -> Iterator[VerifyResult]:
    """Yield the result on each checkpoint that a path names."""
    for folder in run_path.folders:
        yield _result(run_path, folder)


def _result(run_path: RunPath, folder: str) -> VerifyResult:
    problem: CheckpointError | None = None
    try:
        storage = run_path.open(folder).storage
    except NewerFormatError as error:
        return VerifyResult(folder, (_of_manifest(error),), is_newer=True)
    except CheckpointError as error:
        storage, problem = run_path.storage, error
    try:
        reader = _EagerReader(storage, folder)
    except CheckpointError as error:
        return VerifyResult(folder, (_of_manifest(error),))
    damage = reader.verify()
    if problem is not None and not damage:  # whole, but of another step or run than its folder says
        damage.append(_of_manifest(problem))
    manifest = reader.manifest
    counts = (manifest.nbytes, len(manifest.files), len(manifest.tensors))
    return VerifyResult(folder, tuple(damage), *counts)


class _EagerReader(CheckpointReader):
    """A reader that opens whatever has a manifest: with one file missing, the rest is read too."""

    def _check_sizes(self) -> None:
        """Leave the sizes to `verify`, which does not stop at the first wrong one."""


def _of_manifest(error: CheckpointError) -> Damage:
    sentence = UnbrokenError("", error.what, expected=error.expected, found=error.found)
    return Damage(MANIFEST_NAME, "unreadable", None, str(sentence))


def _print_as_found(run_path: RunPath) -> list[VerifyResult]:
    """Print each result as soon as it is known: reading large checkpoints takes its time."""
    console = make_console()
    results = []
    for result in verify(run_path):
        results.append(result)
        console.print(f"{result.folder}: {_words(result)}")
        for damage in result.damage:
            console.print(f"  {damage}")
        console.file.flush()
    bad = [result.folder for result in results if not result.is_intact]
    if bad:
        console.print(f"not usable: {len(bad)} of {len(results)}: {', '.join(bad)}")
    else:
        console.print(f"all intact: {len(results)} of {len(results)}")
    return results


def _words(result: VerifyResult) -> str:
    if result.is_newer:
        return "of a newer format"
    if not result.is_intact:
        return "damaged"
    size = size_text(result.nbytes or 0)
    return f"intact: {size}, {result.files} files, {result.tensors} tensors: every byte matches"


def _as_json(result: VerifyResult) -> dict[str, object]:
    return {**asdict(result), "is_intact": result.is_intact}


def _status(results: list[VerifyResult]) -> int:
    if any(not result.is_intact and not result.is_newer for result in results):
        return CorruptCheckpointError.exit_code
    return NewerFormatError.exit_code if any(one.is_newer for one in results) else 0
