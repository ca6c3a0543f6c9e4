"""Branches: runs that begin in a checkpoint of another run.

A branch is made in `branches/.staging` of the run that it leaves, and one rename makes it a
run: it is there whole, or not at all. Why, is told in `docs/design/0009-branches.md`.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from contextlib import suppress

from unbroken.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    RunDirectoryError,
)
from unbroken.storage import FolderStorage, Storage
from unbroken.store.checkpoint.commit import copy_file, move_durably, remove_staging
from unbroken.store.checkpoint.reader import CheckpointFolder, CheckpointReader
from unbroken.store.format.names import (
    BRANCHES,
    HISTORY_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    NEW_RUN_NAME,
    RUN_NAME,
    STAGING,
    checkpoint_name,
    step_of,
)
from unbroken.store.run.catalog import Lineage
from unbroken.store.run.directory import (
    RunDirectory,
    RunIdentity,
    as_directory_error,
    describe_owner,
    has_identity,
    now_as_text,
    random_id,
    read_identity,
    write_identity,
)
from unbroken.store.run.journal import Journal

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SITES = f"{BRANCHES}/{STAGING}"
_MADE_FILES = {RUN_NAME, NEW_RUN_NAME, HISTORY_NAME, METRICS_NAME}
# What file systems say that have no hard links, or none for this file; then it is copied.
_NO_LINKS = {
    errno.EXDEV,
    errno.EPERM,
    errno.EMLINK,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOSYS,
}


def check_branch_name(name: str) -> None:
    """Refuse what cannot be the name of a branch, which is the name of a folder.

    Raises:
        ConfigError: It has other characters than letters, digits, ".", "_" and "-", begins with
            "." or "-", or is longer than 100.

    Example:
        >>> check_branch_name("lr-low")
    """
    if _NAME.fullmatch(name) is None:
        expected = 'at most 100 letters, digits, ".", "_" and "-", the first not "." or "-"'
        raise ConfigError("branch", "is no name", expected=expected, found=repr(name))


def has_branch(parent: RunDirectory, name: str) -> bool:
    """Return whether a run has a branch of that name, or something else in its place.

    Args:
        parent: The run.
        name: The name.

    Raises:
        ConfigError: It cannot be a name.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> with RunDirectory.open(MemoryStorage()) as run:
        ...     has_branch(run, "lr-low")
        False
    """
    check_branch_name(name)
    with as_directory_error(parent.storage):
        return parent.storage.stat(f"{BRANCHES}/{name}") is not None


def branch(
    parent: RunDirectory,
    name: str,
    *,
    step: int | None = None,
    clock: Callable[[], float] = time.time,
    owner: str | None = None,
    new_id: Callable[[], str] = random_id,
) -> RunDirectory:
    """Open the branch `name` of a run; if it is not there, make it from the checkpoint of `step`.

    A branch has all that the run had at that step: the checkpoint, linked and read whole before
    the branch exists; the best one known there; the lines of metrics.jsonl. So it is whole
    by itself, and the parent may lose its own. A process that is killed while it makes a
    branch leaves none, and the same call again makes it.

    Args:
        parent: The run to leave. Open for reading is enough: another process may train in it.
        name: Names the branch, and its folder in `branches` of the run's directory.
        step: Where it leaves; None only for a branch that is there.
        clock: Seconds since 1970.
        owner: As `RunDirectory.open` takes it.
        new_id: Where the identity of a new branch comes from.

    Returns:
        The directory of the branch, locked for this process.

    Raises:
        CheckpointNotFoundError: The parent has no such checkpoint, or lost it just now.
        ConfigError: The name is none; the branch is there and leaves at another step; or it is
            not there and no step was given.
        CorruptCheckpointError: The checkpoint is damaged; there is no branch.
        LockHeldError: A live process makes this branch, or trains in it.
        RunDirectoryError: What has the name is no branch of this run; or the storage fails.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointWriter
        >>> with RunDirectory.open(MemoryStorage()) as run:
        ...     manifest = CheckpointWriter(run.storage, step=12, run_id=run.run_id).commit({})
        ...     with branch(run, "lr-low", step=12) as child:
        ...         child.catalog.folders(), child.parent.run_id == run.run_id
        ([(12, 'checkpoint-12')], True)
    """
    storage = parent.storage
    with as_directory_error(storage):
        if not has_branch(parent, name):
            begin = _begin_of(parent, name, step)
            _make(parent, name, begin, clock, owner or describe_owner(clock), new_id)
        directory = FolderStorage(storage, f"{BRANCHES}/{name}")
        _refuse_another(directory, parent, step)
        storage.sync_folder(BRANCHES)  # a start may have been killed between its rename and this
        return RunDirectory.open(directory, clock=clock, owner=owner)


def _begin_of(parent: RunDirectory, name: str, step: int | None) -> CheckpointReader:
    """Return the checkpoint in which a new branch will begin."""
    where = parent.storage.describe()
    if step is None:
        what = f"has no branch {name} yet"
        raise ConfigError(where, what, hint="give the step of the checkpoint where it begins")
    known = [known for known, _ in parent.catalog.folders()]
    if step not in known:
        expected, what = f"one of the steps {known}", "no such checkpoint"
        raise CheckpointNotFoundError(where, what, expected=expected, found=step)
    return parent.catalog.open(step)


def _refuse_another(directory: Storage, parent: RunDirectory, step: int | None) -> None:
    """Refuse a folder that is not the requested branch, before it is touched."""
    where = directory.describe()
    lineage = read_identity(directory).parent if has_identity(directory) else None
    if lineage is None:
        hint = "choose another name for the branch, or move that folder away"
        raise RunDirectoryError(where, "is no branch", hint=hint)
    if lineage.run_id != parent.run_id:
        raise RunDirectoryError(
            where,
            "is a branch of another run",
            expected=parent.run_id,
            found=lineage.run_id,
            hint="choose another name; or go on with it as the run directory it is, without branch",
        )
    if step is not None and step != lineage.step:
        raise ConfigError(
            where,
            "is a branch that leaves at another step",
            expected=step,
            found=lineage.step,
            hint=f"to go on with it, ask for step {lineage.step} or for none; "
            f"for a branch from step {step} choose another name",
        )


def _make(
    parent: RunDirectory,
    name: str,
    begin: CheckpointReader,
    clock: Callable[[], float],
    owner: str,
    new_id: Callable[[], str],
) -> None:
    """Make a branch in its staging folder, and commit it; nothing half made has its name."""
    storage, site = parent.storage, f"{_SITES}/{name}"
    for folder in (BRANCHES, _SITES, site):
        _ensure_durably(storage, folder)
    directory = FolderStorage(storage, site)
    lock = directory.lock(LOCK_NAME, owner)  # against a second maker of the same branch
    try:
        _clear(directory)
        taken = _take_over(parent, begin, directory, site)
        lineage = Lineage(parent.run_id, "../..", begin.step, taken)
        _begin_history(directory, lineage)
        write_identity(directory, RunIdentity(new_id(), now_as_text(clock), lineage))
        _commit(storage, site, f"{BRANCHES}/{name}")
    except BaseException:
        with suppress(OSError):  # the next attempt clears what is left
            _clear(directory)
        raise
    finally:
        with suppress(OSError):
            lock.release()


def _ensure_durably(storage: Storage, folder: str) -> None:
    """Make a folder unless it is there; several branches may be made at once."""
    with suppress(FileExistsError):
        storage.make_folder(folder)
    storage.sync_folder(folder.rpartition("/")[0])


def _clear(directory: Storage) -> None:
    """Remove what a killed attempt left. The lock stays; what is not ours is refused."""
    for name in directory.list(""):
        if step_of(name) is not None:
            remove_staging(directory, name)
        elif name in _MADE_FILES:
            directory.remove_file(name)
        elif name != LOCK_NAME:
            hint = "move it away: branches are made here"
            raise RunDirectoryError(directory.describe(name), "is in the way", hint=hint)


def _take_over(
    parent: RunDirectory, begin: CheckpointReader, directory: Storage, site: str
) -> dict[int, str]:
    """Give the branch its checkpoints and metrics; return the state digests by step."""
    readers = [begin]
    best = begin.manifest.facts.get("best_step")
    if isinstance(best, int) and best != begin.step and best in dict(parent.catalog.folders()):
        readers.append(parent.catalog.open(best))
    _copy_metrics(parent, begin, f"{site}/{METRICS_NAME}")
    for reader in readers:
        _link_checkpoint(reader, f"{site}/{checkpoint_name(reader.step)}")
        copy = CheckpointReader(directory, checkpoint_name(reader.step))
        if copy.manifest != reader.manifest:
            raise _deleted_meanwhile(reader)
        copy.check_rest()
    return {reader.step: reader.manifest.state_digest for reader in readers}


def _copy_metrics(parent: RunDirectory, begin: CheckpointReader, target: str) -> None:
    """Copy the lines that metrics.jsonl had when the checkpoint was saved."""
    nbytes = begin.manifest.facts.get("metrics_bytes")
    if not isinstance(nbytes, int) or nbytes == 0:
        return
    try:
        copy_file(parent.storage, METRICS_NAME, target, min(nbytes, parent.metrics.nbytes))
    except (FileNotFoundError, EOFError):  # lost, or rewound just now
        _refuse_if_deleted(begin)
    # A run that is rewound sets its checkpoints aside before it cuts the metrics: if this one
    # is still there, the lines were its own.
    _refuse_if_deleted(begin)


def _refuse_if_deleted(reader: CheckpointReader) -> None:
    try:
        found = CheckpointFolder(reader.storage, reader.folder).read_manifest()
    except CheckpointError:
        raise _deleted_meanwhile(reader) from None
    if found != reader.manifest:
        raise _deleted_meanwhile(reader)


def _link_checkpoint(reader: CheckpointReader, target: str) -> None:
    """Give every file of a checkpoint a second name, durably."""
    storage = reader.storage
    storage.make_folder(target)
    for name in (*(file.name for file in reader.manifest.files), MANIFEST_NAME):
        try:
            _link_or_copy(storage, f"{reader.folder}/{name}", f"{target}/{name}")
        except FileNotFoundError:
            raise _deleted_meanwhile(reader) from None
    storage.sync_folder(target)


def _link_or_copy(storage: Storage, source: str, target: str) -> None:
    try:
        storage.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        copy_file(storage, source, target)
    else:
        storage.sync_file(target)  # somebody may have copied the checkpoint here by hand


def _deleted_meanwhile(reader: CheckpointReader) -> CheckpointNotFoundError:
    """Return the error for a checkpoint that its run deleted while this branch linked it."""
    where = reader.storage.describe(reader.folder)
    hint = (
        "the run that trains there goes on and removes old checkpoints; choose a newer one, or "
        "keep one by a file called `pinned` in its folder"
    )
    return CheckpointNotFoundError(where, "went away while the branch was made", hint=hint)


def _begin_history(directory: Storage, lineage: Lineage) -> None:
    history = Journal(directory, HISTORY_NAME)
    history.append({"event": "branched", "parent": lineage.to_json()})
    history.sync()


def _commit(storage: Storage, site: str, target: str) -> None:
    """Make the staging folder, durable in all its parts, the branch. A loser of a race gives up."""
    try:
        move_durably(storage, site, target)
    except FileExistsError:
        _clear(FolderStorage(storage, site))
