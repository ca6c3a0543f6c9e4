"""The one commit point: a staging folder, complete and durable, becomes a checkpoint by a rename.

Why the steps stand in this order is told in `docs/design/0001-commit-protocol.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from unbroken.errors import CheckpointError
from unbroken.storage import Storage
from unbroken.store.layout import MANIFEST_NAME, SET_ASIDE, checkpoint_name
from unbroken.store.manifest import Manifest
from unbroken.store.reader import CheckpointReader
from unbroken.store.removal import (
    ensure_folder,
    move_durably,
    remove_staging,
    remove_tree,
    rename_or_copy,
    settle_replaced,
)


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
    if storage.stat(folder) is None:
        return None
    try:
        reader = CheckpointReader(storage, folder)
        found = reader.manifest
        same = (found.state_digest, found.step, found.run_id, found.facts) == (
            manifest.state_digest,
            manifest.step,
            manifest.run_id,
            manifest.facts,  # a resume goes by them: how long the metrics were, which was best
        )
        if same:
            reader.check_rest()
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
