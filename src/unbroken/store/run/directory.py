"""One run, one directory, one owner; run.json says which run it is, in which version of the format.

Each manifest names the run, too: where run.json was lost or damaged, they tell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

from unbroken.errors import CheckpointError, RunDirectoryError, UnbrokenError
from unbroken.storage import Lock, Storage, storage_at
from unbroken.storage.protocol import Closing
from unbroken.store.checkpoint.commit import (
    copy_file,
    ensure_folder,
    free_name,
    move_durably,
    sweep,
)
from unbroken.store.checkpoint.reader import CheckpointFolder, VerifiedCache
from unbroken.store.format.canonical_json import (
    Fields,
    Json,
    MalformedError,
    from_strict,
    to_canonical,
)
from unbroken.store.format.manifest import Manifest
from unbroken.store.format.names import (
    BRANCHES,
    HISTORY_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    METRICS_NAME,
    NEW_RUN_NAME,
    RUN_NAME,
    SET_ASIDE,
    STAGING,
    STEP_RECORDS,
    TRASH,
    step_of,
)
from unbroken.store.run.catalog import (
    Catalog,
    KeepPolicy,
    Lineage,
    Pruned,
    belongs_to,
    prune,
)
from unbroken.store.run.journal import Journal

# Which run a directory belongs to.


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
    try:
        return _parse(_read(storage), where), None
    except (FileNotFoundError, NotADirectoryError):
        rebuilt = _from_checkpoints(storage)
        return rebuilt, None if rebuilt is None else "is missing"
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
    try:
        names = storage.list("")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if HISTORY_NAME not in names and METRICS_NAME not in names:
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


# The directory, and its lock.


# What a start that was killed before it wrote run.json may have left ...
_OWN_BEGINNINGS = {LOCK_NAME, NEW_RUN_NAME}
_OWN_FILES = {RUN_NAME, NEW_RUN_NAME, LOCK_NAME, HISTORY_NAME, METRICS_NAME}
_OWN_FOLDERS = {STAGING, TRASH, SET_ASIDE, STEP_RECORDS, BRANCHES}
# ... and what operating systems put into folders unasked.
_TOLERATED = {".DS_Store", "Thumbs.db", "desktop.ini", "lost+found"}

Place = Storage | str | os.PathLike[str]


def now_as_text(clock: Callable[[], float]) -> str:
    """Return the date as files hold it: "2026-01-31T12:00:00.000+00:00"."""
    return datetime.fromtimestamp(clock(), UTC).isoformat(timespec="milliseconds")


class RunDirectory(Closing):
    """The directory of one run: its identity, its checkpoints, its journals, its lock.

    Make it with `open`, to work in it as its only owner, or with `open_readonly`, to look.

    Attributes:
        storage: Where it is.
        run_id: Names the run for ever.
        created: When the run began, in UTC.
        parent: Where it comes from, if it is a branch of another run.
        catalog: Its checkpoints.
        history: What happened to the run: starts, saves, rejections.
        metrics: What the training measured.
        verified: The checkpoints that this process has read whole.
        previous_owner: Who held the lock before and ended without giving it back; None: nobody.
        left_over: What stands in our own folders but is not ours, and was not swept.
        notes: What was repaired when it was opened, for people.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> with RunDirectory.open(MemoryStorage(), new_id=lambda: "a" * 32) as run:
        ...     run.run_id, run.catalog.folders()
        ('aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', [])
    """

    def __init__(
        self,
        storage: Storage,
        identity: RunIdentity,
        lock: Lock | None,
        left_over: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        self.storage = storage
        self.run_id = identity.id
        self.created = identity.created
        self.parent = identity.parent
        self.catalog = Catalog(storage, identity.id, identity.parent)
        self.history = Journal(storage, HISTORY_NAME)
        self.metrics = Journal(storage, METRICS_NAME)
        self.verified = VerifiedCache()
        self.previous_owner = None if lock is None else lock.previous_owner
        self.left_over = left_over
        self.notes = notes
        self._lock = lock

    @classmethod
    def open(
        cls,
        where: Place,
        *,
        clock: Callable[[], float] = time.time,
        owner: str | None = None,
        new_id: Callable[[], str] = random_id,
        may_hold_foreign_files: bool = False,
    ) -> Self:
        """Take the directory of a run, or begin one in a directory that is empty or not there.

        What killed processes left half done is finished or swept. A directory that holds
        something else is refused before anything in it is touched.

        Args:
            where: The directory, or the storage that is one.
            clock: Seconds since 1970.
            owner: What others read when they find it locked; by default host, process, boot
                and time.
            new_id: Where the identity of a new run comes from.
            may_hold_foreign_files: Begin a run also beside files that are not its own, which stay.

        Raises:
            LockHeldError: A live process works in it.
            RunDirectoryError: It holds something else, is of a newer version, is a file, or
                cannot be written.
        """
        with as_directory_error(where):
            storage = _storage_of(where, create=True)
            if not may_hold_foreign_files:
                _refuse_foreign(storage)
            lock = storage.lock(LOCK_NAME, owner or describe_owner(clock))
            try:
                identity, notes = _identity_of(
                    storage, clock, new_id, may_hold_foreign_files=may_hold_foreign_files
                )
                return cls(storage, identity, lock, tuple(sweep(storage)), notes)
            except BaseException:
                with suppress(OSError):
                    lock.release()
                raise

    @classmethod
    def open_readonly(cls, where: Place) -> Self:
        """Look at a run without locking it and without writing or making anything.

        Args:
            where: The directory, or the storage that is one.

        Raises:
            RunDirectoryError: It is not the directory of a run.
        """
        with as_directory_error(where):
            storage = _storage_of(where, create=False)
            return cls(storage, read_identity(storage), None)

    @property
    def is_readonly(self) -> bool:
        """Whether this process is not the owner: it was opened to look, or is closed."""
        return self._lock is None

    def owns(self, storage: Storage, manifest: Manifest) -> bool:
        """Return whether the run wrote a checkpoint, or took it over as a branch."""
        return storage is self.storage and belongs_to(manifest, self.run_id, self.parent)

    def check_journals(self) -> None:
        """Raise if no record could be appended to one of the journals; nothing is changed.

        Raises:
            RunDirectoryError: It cannot be written, or something else stands in its place.
        """
        self.metrics.check()
        self.history.check()

    def require_ownership(self) -> None:
        """Raise unless this very process still is the owner, as it must be where it commits.

        Raises:
            LockHeldError: Another process is, or this one was forked from the owner.
            RunDirectoryError: It is open for reading only, or the storage fails.
        """
        with as_directory_error(self.storage):
            if self._lock is None:
                raise RunDirectoryError(self.storage.describe(), "is open for reading only")
            self._lock.require_held()

    def prune(self, policy: KeepPolicy, *, best_steps: Collection[int] = frozenset()) -> Pruned:
        """Remove the checkpoints that no rule keeps; see `unbroken.store.prune`.

        Raises:
            RunDirectoryError: This process is not the owner, or the storage fails.
        """
        with as_directory_error(self.storage):
            self.require_ownership()
            return prune(
                self.storage,
                policy,
                run_id=self.run_id,
                parent=self.parent,
                best_steps=best_steps,
                verified=self.verified,
            )

    def put_file(self, name: str, data: bytes) -> None:
        """Write a file for other programs next to the checkpoints, whole or not at all.

        One that has the same bytes is left as it is; another one is set aside.

        Args:
            name: As a file in a checkpoint may be called; none that a run has itself.
            data: The whole content.

        Raises:
            RunDirectoryError: The directory is not ours to write in, or cannot be written.
        """
        storage, new = self.storage, f"{name}.new"
        if name in _OWN_FILES:
            raise RunDirectoryError(storage.describe(name), "is a file of the run itself")
        with as_directory_error(storage):
            if _content(storage, name) == data:
                return
            self.require_ownership()
            if storage.stat(new) is not None:  # of a start that was killed
                storage.remove_file(new)
            with storage.create(new, len(data)) as file:
                file.write(data)
                file.sync()
            if storage.stat(name) is not None:
                ensure_folder(storage, SET_ASIDE)
                move_durably(storage, name, free_name(storage, SET_ASIDE, name))
            move_durably(storage, new, name)

    def set_aside_metrics(self) -> str:
        """Copy metrics.jsonl, durably, to where nothing reads it again, and return the name.

        Raises:
            RunDirectoryError: The storage fails.
        """
        with as_directory_error(self.storage):
            ensure_folder(self.storage, SET_ASIDE)
            target = free_name(self.storage, SET_ASIDE, METRICS_NAME)
            copy_file(self.storage, METRICS_NAME, target)
            return target

    def close(self) -> None:
        """Release the directory; closing twice is allowed."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()


def _storage_of(where: Place, *, create: bool) -> Storage:
    if isinstance(where, str | os.PathLike):
        return storage_at(where, create=create)
    return where


def _content(storage: Storage, name: str) -> bytes | None:
    """Return the bytes of a file; None: there is none."""
    found = storage.stat(name)
    if found is None or found.is_folder:
        return None
    content = bytearray(found.nbytes)
    with storage.open(name) as file:
        file.read_into(0, memoryview(content))
    return bytes(content)


def _refuse_foreign(storage: Storage) -> None:
    """Refuse a directory with something in it that no run left there."""
    identity, _ = find_identity(storage)
    if identity is None:
        _refuse_others(storage)


def _refuse_others(storage: Storage) -> None:
    others = [name for name in storage.list("") if name not in _OWN_BEGINNINGS | _TOLERATED]
    foreign = [name for name in others if not _is_copy(storage, name)]
    if foreign != others:  # beside copies, what else belongs to a run directory
        foreign = [name for name in foreign if name not in _OWN_FOLDERS]
    if foreign:
        raise RunDirectoryError(
            storage.describe(),
            "holds something else",
            expected="a run.json, or an empty directory",
            found=", ".join(foreign[:3]) + (", ..." if foreign[3:] else ""),
            hint=_hint_on(storage, foreign),
        )


def _is_copy(storage: Storage, name: str) -> bool:
    """Return whether a checkpoint stands under its own name where no run has begun yet."""
    return step_of(name) is not None and storage.stat(f"{name}/{MANIFEST_NAME}") is not None


def _hint_on(storage: Storage, foreign: list[str]) -> str:
    for name in foreign:
        if storage.stat(f"{name}/{MANIFEST_NAME}") is not None:
            return (
                f"{name} looks like a checkpoint: to begin a run in it, give its path as "
                "resume_from_checkpoint, or call it checkpoint-<its step>; "
                "or choose another directory"
            )
        if step_of(name) is not None:
            return (
                f"{name} is no checkpoint of unbroken; those of transformers' own Trainer go on in "
                "unbroken.adapters.transformers.Trainer; or choose another directory"
            )
    return "choose another directory for the run"


def _identity_of(
    storage: Storage,
    clock: Callable[[], float],
    new_id: Callable[[], str],
    *,
    may_hold_foreign_files: bool,
) -> tuple[RunIdentity, tuple[str, ...]]:
    """Return the run's identity; under the lock, so that two starts cannot both give one."""
    identity, problem = find_identity(storage)
    if identity is not None and problem is not None:
        replace_identity(storage, identity)
        warning = f"run.json {problem}: made anew from what the checkpoints say (run {identity.id})"
        return identity, (warning,)
    if identity is None:
        if not may_hold_foreign_files:
            _refuse_others(storage)
        write_identity(storage, RunIdentity(new_id(), now_as_text(clock)))
        identity = read_identity(storage)
    return identity, ()


def describe_owner(clock: Callable[[], float]) -> str:
    """Return what others read when they find a run locked: host, process, boot and time."""
    host, boot = this_machine()
    return f"host {host}, process {os.getpid()}, boot {boot}, since {now_as_text(clock)}"


def this_machine() -> tuple[str, str]:
    """Return the name of this machine and which of its boots this is."""
    boot = "unknown"
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return os.uname().nodename, boot


@contextmanager
def as_directory_error(where: Place) -> Iterator[None]:
    """Turn what the disk says into the error that names the run directory."""
    try:
        yield
    except UnbrokenError:
        raise
    except OSError as error:
        path = os.fspath(where) if isinstance(where, str | os.PathLike) else where.describe()
        hint = "choose a directory on a disk that can be written, or repair this one"
        raise RunDirectoryError(
            str(error.filename or path), "cannot be used", found=error.strerror, hint=hint
        ) from error
