"""Saving together: every rank stores its share, all agree, one rank commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, cast

from unbroken.checkpoint.shares import Share
from unbroken.distributed import Group
from unbroken.storage import Storage
from unbroken.store import CheckpointWriter, FileEntry, Json, Manifest, store_leaves


def save_together(
    group: Group,
    storage: Storage,
    begin: Callable[[], CheckpointWriter],
    share_of: Callable[[Sequence[int]], Share],
    commit: Callable[[CheckpointWriter], Manifest],
) -> Manifest | None:
    """Make one checkpoint of what all ranks store; nothing is committed unless all have stored.

    Args:
        group: The ranks; each calls this.
        storage: The run directory, as this rank sees it.
        begin: Makes the writer; called on rank 0 alone.
        share_of: Returns what this rank stores, given the ranks that do not see where to.
        commit: Adds what rank 0 alone knows, and commits; called on rank 0 alone.

    Returns:
        The manifest, on rank 0.

    Raises:
        SaveError: The disk failed or is full on this rank.
        RankError: Another rank failed; nothing was committed.
    """
    with ExitStack() as stack:
        writer = group.together(
            "begin a save", lambda: None if group.rank else stack.enter_context(begin())
        )
        staging = None if writer is None else writer.staging
        folder = str(group.share("the staging folder", staging))
        seen = group.gather("who sees the staging folder", _exists(storage, folder))
        share = share_of([rank for rank, sees in enumerate(seen) if not sees])
        stored = group.together("save", lambda: _store(share, writer, storage, folder))
        told = group.gather("what is stored", [file.to_json() for file in stored])
        return group.together(
            "commit", lambda: None if writer is None else _committed(writer, told, commit)
        )


def _exists(storage: Storage, folder: str) -> bool:
    try:
        return storage.stat(folder) is not None
    except OSError:
        return False


def _store(
    share: Share, writer: CheckpointWriter | None, storage: Storage, folder: str
) -> Sequence[FileEntry]:
    if writer is None:
        return store_leaves(storage, folder, share.leaves, share.files)
    writer.write_leaves(share.leaves)
    for name, data in share.files.items():
        writer.write_file(name, data)
    return ()


def _committed(
    writer: CheckpointWriter,
    told: Sequence[Json],
    commit: Callable[[CheckpointWriter], Manifest],
) -> Manifest:
    for files in told[1:]:
        writer.adopt(FileEntry.from_json(file) for file in cast("Sequence[Any]", files))
    return commit(writer)
