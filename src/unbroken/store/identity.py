"""run.json: which run a directory belongs to, and in which version of the format."""

from __future__ import annotations

from dataclasses import dataclass

from unbroken.errors import RunDirectoryError
from unbroken.storage import Storage
from unbroken.store.canonical import Json, MalformedError, from_strict, to_canonical
from unbroken.store.fields import Fields
from unbroken.store.layout import NEW_RUN_NAME, RUN_NAME
from unbroken.store.lineage import Lineage

_FORMAT = "unbroken run"
_VERSION_OF_PLAIN_RUNS = 1
_VERSION_OF_BRANCHES = 2  # a reader that knows no branches must not take one for damaged
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class RunIdentity:
    """Who a run directory belongs to.

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


def read_identity(storage: Storage) -> RunIdentity:
    """Return what run.json says.

    Raises:
        RunDirectoryError: It is damaged, of another program, or of a newer version.
    """
    where = storage.describe(RUN_NAME)
    try:
        return _parse(_read(storage), where)
    except MalformedError as error:
        hint = "another program's directory? choose another one; damaged? restore this file"
        raise RunDirectoryError(
            where, error.what, expected=error.expected, found=error.found, hint=hint
        ) from None


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
