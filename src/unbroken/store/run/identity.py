"""run.json: which run a directory belongs to, and in which version of the format.

Each manifest names the run, too: where run.json was lost or damaged, they tell.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from unbroken.errors import CheckpointError, RunDirectoryError
from unbroken.storage import Storage
from unbroken.store.checkpoint.commit import ensure_folder, free_name, move_durably
from unbroken.store.checkpoint.reader import CheckpointFolder
from unbroken.store.format.canonical_json import (
    Fields,
    Json,
    MalformedError,
    from_strict,
    to_canonical,
)
from unbroken.store.format.names import (
    HISTORY_NAME,
    METRICS_NAME,
    NEW_RUN_NAME,
    RUN_NAME,
    SET_ASIDE,
)
from unbroken.store.run.catalog import Catalog, Lineage
from unbroken.store.run.journal import Journal

_FORMAT = "unbroken run"
_VERSION_OF_PLAIN_RUNS = 1
_VERSION_OF_BRANCHES = 2  # a reader that knows no branches must not take one for damaged
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class RunIdentity:
    """The run that a directory belongs to.

    Attributes:
        id: Names the run for ever, 32 hexadecimal digits drawn at random.
        created: When it began, in UTC; for people.
        parent: Where it comes from, if it is a branch of another run.
    """

    id: str
    created: str
    parent: Lineage | None = None


def has_identity(storage: Storage) -> bool:
    """Return whether the directory belongs to a run."""
    return storage.stat(RUN_NAME) is not None


def write_identity(storage: Storage, identity: RunIdentity) -> None:
    """Write run.json, whole and durable or not at all."""
    if storage.stat(NEW_RUN_NAME) is not None:  # a start was killed right here
        storage.remove_file(NEW_RUN_NAME)
    fields: dict[str, Json] = {"format": _FORMAT, "version": _VERSION_OF_PLAIN_RUNS}
    fields |= {"id": identity.id, "created": identity.created}
    if identity.parent is not None:
        fields |= {"version": _VERSION_OF_BRANCHES, "parent": identity.parent.to_json()}
    with storage.create(NEW_RUN_NAME) as file:
        file.write(to_canonical(fields) + b"\n")
        file.sync()
    storage.rename(NEW_RUN_NAME, RUN_NAME)
    storage.sync_folder("")


def find_identity(storage: Storage) -> tuple[RunIdentity | None, str | None]:
    """Return which run a directory belongs to, if to any; and what is wrong with its run.json.

    Raises:
        RunDirectoryError: run.json is damaged and nothing else tells, or is of another program or
            a newer version.
    """
    where = storage.describe(RUN_NAME)
    if not has_identity(storage):
        rebuilt = _from_checkpoints(storage)
        return rebuilt, None if rebuilt is None else "is missing"
    try:
        return _parse(_read(storage), where), None
    except MalformedError as error:
        rebuilt = _from_checkpoints(storage)
        if rebuilt is not None:
            return rebuilt, error.what
        hint = "another program's directory? choose another one; damaged? restore this file"
        raise RunDirectoryError(
            where, error.what, expected=error.expected, found=error.found, hint=hint
        ) from None


def read_identity(storage: Storage) -> RunIdentity:
    """Return which run a directory belongs to.

    Raises:
        RunDirectoryError: As `find_identity`; or it belongs to none.
    """
    identity, _ = find_identity(storage)
    if identity is None:
        hint = "give a directory that holds a run.json"
        raise RunDirectoryError(storage.describe(), "is not a run's directory", hint=hint)
    return identity


def replace_identity(storage: Storage, identity: RunIdentity) -> None:
    """Write run.json anew, durably; what stands there is set aside."""
    if has_identity(storage):
        ensure_folder(storage, SET_ASIDE)
        move_durably(storage, RUN_NAME, free_name(storage, SET_ASIDE, RUN_NAME))
    write_identity(storage, identity)


def _from_checkpoints(storage: Storage) -> RunIdentity | None:
    """Return the identity that the manifests agree on, for a directory that lost its run.json.

    Checkpoints alone do not make one: somebody may have copied them here.
    """
    if storage.stat(HISTORY_NAME) is None and storage.stat(METRICS_NAME) is None:
        return None
    for _, folder in reversed(Catalog(storage).folders()):
        try:
            found = CheckpointFolder(storage, folder).read_manifest()
        except CheckpointError:
            continue
        parent = _parent_from_checkpoints(storage)
        is_taken_over = parent is not None and parent.run_id == found.run_id
        run_id = random_id() if is_taken_over else found.run_id
        return RunIdentity(run_id, found.created, parent)
    return None


def _parent_from_checkpoints(storage: Storage) -> Lineage | None:
    """Return where the history says that a branch comes from."""
    for event in Journal(storage, HISTORY_NAME).records(past_damage=True):
        if event.get("event") == "branched":
            try:
                return Lineage.from_json(event.get("parent"))
            except MalformedError:
                return None
    return None


def random_id() -> str:
    """Return the identity of a new run: 32 hexadecimal digits, drawn at random."""
    return os.urandom(16).hex()


def _read(storage: Storage) -> bytes:
    with storage.open(RUN_NAME) as file:
        if file.nbytes > _MAX_BYTES:
            raise MalformedError("is too large", f"at most {_MAX_BYTES} bytes", file.nbytes)
        raw = bytearray(file.nbytes)
        file.read_into(0, memoryview(raw))
    return bytes(raw)


def _parse(raw: bytes, where: str) -> RunIdentity:
    fields = Fields(from_strict(raw), "run.json")
    form, version = fields.text("format"), fields.count("version")
    if form != _FORMAT:
        raise MalformedError("is of another program", _FORMAT, form)
    if version not in (_VERSION_OF_PLAIN_RUNS, _VERSION_OF_BRANCHES):
        expected, hint = "1 or 2", "upgrade unbroken to use this directory"
        raise RunDirectoryError(
            where, "has another version", expected=expected, found=version, hint=hint
        )
    run_id, created = fields.text("id"), fields.text("created")
    is_branch = version == _VERSION_OF_BRANCHES
    parent = Lineage.from_json(fields.value("parent")) if is_branch else None
    fields.done()
    return RunIdentity(run_id, created, parent)
