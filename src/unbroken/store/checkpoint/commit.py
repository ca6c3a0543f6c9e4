"""The one commit point: a staging folder, complete and durable, becomes a checkpoint by a rename.

Why the steps stand in this order is told in `docs/design/0001-commit-protocol.md`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress

from unbroken.errors import CheckpointError
from unbroken.storage import Stat, Storage
from unbroken.store.checkpoint.reader import CheckpointFolder, CheckpointReader
from unbroken.store.format.manifest import Manifest
from unbroken.store.format.names import (
    LOCK_NAME,
    MANIFEST_NAME,
    SET_ASIDE,
    STAGING,
    TRASH,
    checkpoint_name,
    copying_name,
    is_copying,
    is_file_name,
    step_of_numbered,
    step_of_replaced,
)

# Taking things away so that a cut at any moment leaves nothing half there.
#
# What goes is first renamed into `.trash`, durably, and only then unlinked file by file: a
# checkpoint is whole or it is not there. The same rules serve the next start, which finishes
# what a killed process began.
#
# A rename may be refused because the names are on two devices (`EXDEV`): a mount inside the run
# directory, or a folder in a lower layer of overlayfs, as the images of containers have it. Then a
# copy is made beside the target, durably, and renamed there; only then does the source go.


_CHUNK_BYTES = 1 << 20


def ensure_folder(storage: Storage, path: str) -> None:
    """Make a folder of the run directory, durably, unless it is there."""
    try:
        storage.make_folder(path)
    except FileExistsError:
        return
    storage.sync_folder("")


def free_name(storage: Storage, folder: str, name: str) -> str:
    """Return the first of "folder/name.1", "folder/name.2", ... that is free."""
    taken = set(storage.list(folder))
    number = 1
    while {f"{name}.{number}", f"{name}.{number}.txt"} & taken:
        number += 1
    return f"{folder}/{name}.{number}"


def move_durably(storage: Storage, source: str, target: str) -> None:
    """Rename between two folders so that no power cut loses both names."""
    is_copy = rename_or_copy(storage, source, target)
    # The new name first: were the old one's absence durable alone, nothing would lead there.
    storage.sync_folder(_parent_of(target))
    if is_copy:
        remove_tree(storage, source)
    storage.sync_folder(_parent_of(source))


def rename_or_copy(storage: Storage, source: str, target: str) -> bool:
    """Let a file or folder appear at `target` in one step.

    Returns:
        Whether it is a copy, on another device, of a source that is still there.

    Raises:
        FileExistsError: `target` exists.
        OSError: The storage fails; the source is as it was, and there is no target.
    """
    try:
        storage.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    else:
        return False
    partial = _joined(_parent_of(target), copying_name(target.rpartition("/")[2]))
    remove_tree(storage, partial)  # of a process that was killed
    try:
        _copy_tree(storage, source, partial)
        storage.rename(partial, target)
    except OSError:
        with suppress(OSError):  # the next start sweeps it
            remove_tree(storage, partial)
        raise
    return True


def _copy_tree(storage: Storage, source: str, target: str) -> None:
    """Copy a file, or a folder and all in it but locks, durably."""
    found = storage.stat(source)
    if found is None or not found.is_folder:
        copy_file(storage, source, target)
        return
    storage.make_folder(target)
    for name in storage.list(source):
        if name != LOCK_NAME:  # whoever opens the copy makes its own
            _copy_tree(storage, f"{source}/{name}", f"{target}/{name}")
    storage.sync_folder(target)


def remove_tree(storage: Storage, path: str) -> None:
    """Remove a file or folder, if it is there, of which a whole copy is elsewhere.

    Of a checkpoint, the manifest goes first, durably: what is left is none.
    """
    found = storage.stat(path)
    if found is None:
        return
    if not found.is_folder:
        storage.remove_file(path)
        return
    names = storage.list(path)
    if MANIFEST_NAME in names:
        storage.remove_file(f"{path}/{MANIFEST_NAME}")
        storage.sync_folder(path)
    for name in names:
        if name != MANIFEST_NAME:
            remove_tree(storage, f"{path}/{name}")
    storage.remove_folder(path)


def _parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def copy_file(storage: Storage, source: str, target: str, nbytes: int | None = None) -> None:
    """Copy a file, or its first `nbytes` bytes, durably; nothing of what was read is checked."""
    with storage.open(source) as old:
        end = old.nbytes if nbytes is None else nbytes
        with storage.create(target, end) as new:
            for offset in range(0, end, _CHUNK_BYTES):
                chunk = bytearray(min(_CHUNK_BYTES, end - offset))
                old.read_into(offset, memoryview(chunk))
                new.write(chunk)
            new.sync()
    storage.sync_folder(target.rpartition("/")[0])


def remove_checkpoint(storage: Storage, folder: str) -> None:
    """Remove a checkpoint: at once and for ever gone, as far as any reader can tell."""
    ensure_folder(storage, TRASH)
    trashed = free_name(storage, TRASH, folder)
    try:
        storage.rename(folder, trashed)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _unlink_in_place(storage, folder)
        return
    storage.sync_folder(TRASH)
    storage.sync_folder("")
    _unlink_listed(storage, trashed)


def _unlink_in_place(storage: Storage, folder: str) -> None:
    """Remove a checkpoint where it stands; its manifest goes first, durably."""
    names = [file.name for file in CheckpointFolder(storage, folder).read_manifest().files]
    storage.remove_file(f"{folder}/{MANIFEST_NAME}")
    storage.sync_folder(folder)
    for name in names:
        storage.remove_file(f"{folder}/{name}")
    storage.remove_folder(folder)
    storage.sync_folder("")


def remove_staging(storage: Storage, folder: str) -> None:
    """Remove a staging folder and the files in it that a writer may have put there."""
    for name in storage.list(folder):
        if is_file_name(name) or name == MANIFEST_NAME:
            storage.remove_file(f"{folder}/{name}")
    storage.remove_folder(folder)


def settle_replaced(storage: Storage) -> None:
    """Finish, or undo, the replacing of a checkpoint by another of the same step.

    While "set-aside/checkpoint-10.replaced" has no successor it *is* checkpoint-10.
    """
    for name in names_in(storage, SET_ASIDE):
        step = step_of_replaced(name)
        if step is None:
            continue
        target, replaced = checkpoint_name(step), f"{SET_ASIDE}/{name}"
        found = storage.stat(target)
        if _is_remains(storage, target, found) and not _is_remains(
            storage, replaced, storage.stat(replaced)
        ):
            move_durably(storage, target, free_name(storage, SET_ASIDE, target))
            found = None
        if found is not None:
            target = free_name(storage, SET_ASIDE, target)
        move_durably(storage, replaced, target)


def _is_remains(storage: Storage, folder: str, found: Stat | None) -> bool:
    """Return whether a folder has no manifest, as a checkpoint that was being taken away."""
    if found is None or not found.is_folder:
        return False
    return storage.stat(f"{folder}/{MANIFEST_NAME}") is None


def sweep(storage: Storage) -> list[str]:
    """Remove what killed processes left behind; only the owner of the run's lock may call it.

    Returns:
        What is in `.staging` and `.trash` and stays, because unbroken did not put it there.

    Raises:
        OSError: A folder cannot be listed, or a replaced checkpoint cannot be put back.
    """
    settle_replaced(storage)
    for folder in ("", SET_ASIDE):
        for name in names_in(storage, folder):
            if is_copying(name):
                with suppress(OSError):
                    remove_tree(storage, _joined(folder, name))
    left = []
    for folder, remove in ((STAGING, remove_staging), (TRASH, _unlink_listed)):
        for name in names_in(storage, folder):
            path = f"{folder}/{name}"
            if step_of_numbered(name) is not None:
                with suppress(OSError):  # a file that is not ours keeps its folder
                    remove(storage, path)
            if storage.stat(path) is not None:
                left.append(path)
    return left


def names_in(storage: Storage, folder: str) -> list[str]:
    """Return the names in a folder; none where there is no such folder."""
    try:
        return storage.list(folder)
    except FileNotFoundError:
        return []


def _unlink_listed(storage: Storage, folder: str) -> None:
    """Unlink the files that the manifest lists, and the manifest last: until then it can tell."""
    if MANIFEST_NAME in storage.list(folder):
        try:
            names = [file.name for file in CheckpointFolder(storage, folder).read_manifest().files]
        except CheckpointError:
            return
        for name in names:
            if storage.stat(f"{folder}/{name}") is not None:
                storage.remove_file(f"{folder}/{name}")
        storage.remove_file(f"{folder}/{MANIFEST_NAME}")
    storage.remove_folder(folder)


def commit_staging(
    storage: Storage,
    staging: str,
    manifest: Manifest,
    require_ownership: Callable[[], None] = lambda: None,
) -> Manifest:
    """Make a checkpoint of a staging folder whose files, but for the manifest, are durable.

    A checkpoint of the same step is never overwritten. If it is intact and holds the same
    state, it stays and the staging folder goes; else it is set aside, and counts until the
    new one stands in its place.

    Args:
        storage: The run directory.
        staging: The staging folder.
        manifest: What is in it.
        require_ownership: Raises if this process may not commit; called just before it does.

    Returns:
        The manifest of the checkpoint that is now there, durably.

    Raises:
        OSError: Nothing was committed; everything that was there before still is.
    """
    _write_manifest(storage, staging, manifest)
    target = checkpoint_name(manifest.step)
    kept = _same_state(storage, target, manifest)
    if kept is not None:
        _sync_checkpoint(storage, target, kept)
        with suppress(OSError):  # the next start sweeps it
            remove_staging(storage, staging)
        return kept
    require_ownership()
    _make_way(storage, target)
    _swing(storage, staging, target)
    with suppress(OSError):  # the next start settles it; the new checkpoint is durable
        settle_replaced(storage)
    return manifest


def _write_manifest(storage: Storage, staging: str, manifest: Manifest) -> None:
    with storage.create(f"{staging}/{MANIFEST_NAME}") as file:
        file.write(manifest.to_bytes())
        file.sync()
    storage.sync_folder(staging)


def _swing(storage: Storage, staging: str, target: str) -> None:
    """The commit. A failure takes it back, so that trying again starts from new names."""
    is_copy = False
    try:
        is_copy = rename_or_copy(storage, staging, target)
        storage.sync_folder("")
    except OSError:
        with suppress(OSError):
            if is_copy:
                remove_tree(storage, target)
            elif storage.stat(staging) is None:
                storage.rename(target, staging)
            settle_replaced(storage)
        raise
    if is_copy:
        with suppress(OSError):  # the next start sweeps it
            remove_staging(storage, staging)


def _same_state(storage: Storage, folder: str, manifest: Manifest) -> Manifest | None:
    """Return the manifest of an intact checkpoint in `folder` that holds the same state."""
    try:
        found = CheckpointFolder(storage, folder).read_manifest()
        same = (found.state_digest, found.step, found.run_id, found.facts) == (
            manifest.state_digest,
            manifest.step,
            manifest.run_id,
            manifest.facts,  # a resume goes by them: how long the metrics were, which was best
        )
        if same:
            CheckpointReader(storage, folder).check_rest()
    except CheckpointError:
        return None
    return found if same else None


def _sync_checkpoint(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Make durable what may have been copied here, or renamed just before a kill."""
    for file in manifest.files:
        storage.sync_file(f"{folder}/{file.name}")
    storage.sync_file(f"{folder}/{MANIFEST_NAME}")
    storage.sync_folder(folder)
    storage.sync_folder("")


def _make_way(storage: Storage, target: str) -> None:
    """Move what stands at `target` to a name under which it still counts."""
    if storage.stat(target) is None:
        return
    ensure_folder(storage, SET_ASIDE)
    settle_replaced(storage)
    move_durably(storage, target, f"{SET_ASIDE}/{target}.replaced")
