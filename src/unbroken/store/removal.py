"""Taking things away so that a cut at any moment leaves nothing half there.

What goes is first renamed into `.trash`, durably, and only then unlinked file by file: a
checkpoint is whole or it is not there. The same rules serve the next start, which finishes
what a killed process began.
"""

from __future__ import annotations

from contextlib import suppress

from unbroken.errors import CheckpointError
from unbroken.storage import Storage
from unbroken.store.checkpoint_folder import CheckpointFolder
from unbroken.store.layout import (
    MANIFEST_NAME,
    SET_ASIDE,
    STAGING,
    TRASH,
    checkpoint_name,
    is_file_name,
    step_of_numbered,
    step_of_replaced,
)

_CHUNK_BYTES = 1 << 20


def ensure_folder(storage: Storage, path: str) -> None:
    """Make a folder of the run directory, durably, unless it is there."""
    if storage.stat(path) is None:
        storage.make_folder(path)
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
    storage.rename(source, target)
    # The new name first: were the old one's absence durable alone, nothing would lead there.
    storage.sync_folder(target.rpartition("/")[0])
    storage.sync_folder(source.rpartition("/")[0])


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
    move_durably(storage, folder, trashed)
    _unlink_listed(storage, trashed)


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
    if storage.stat(SET_ASIDE) is None:
        return
    for name in storage.list(SET_ASIDE):
        step = step_of_replaced(name)
        if step is None:
            continue
        target = checkpoint_name(step)
        if storage.stat(target) is not None:
            target = free_name(storage, SET_ASIDE, target)
        move_durably(storage, f"{SET_ASIDE}/{name}", target)


def sweep(storage: Storage) -> list[str]:
    """Remove what killed processes left behind; only the owner of the run's lock may call it.

    Returns:
        What is in `.staging` and `.trash` and stays, because unbroken did not put it there.

    Raises:
        OSError: A folder cannot be listed, or a replaced checkpoint cannot be put back.
    """
    settle_replaced(storage)
    left = []
    for folder, remove in ((STAGING, remove_staging), (TRASH, _unlink_listed)):
        for name in storage.list(folder) if storage.stat(folder) is not None else ():
            path = f"{folder}/{name}"
            if step_of_numbered(name) is not None:
                with suppress(OSError):  # a file that is not ours keeps its folder
                    remove(storage, path)
            if storage.stat(path) is not None:
                left.append(path)
    return left


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
