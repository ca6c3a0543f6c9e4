"""Does the file system under a run directory keep what a commit relies on? Tried, not believed."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from unbroken.cli.doctor.finding import Finding, Severity
from unbroken.cli.run_paths import is_run
from unbroken.cli.tables import size_text
from unbroken.errors import RunDirectoryError
from unbroken.storage import LocalStorage, Storage

# Which file system a folder is on, and what that kind of file system does not promise.


_MOUNTS = Path("/proc/mounts")
_IN_MEMORY = {"tmpfs", "ramfs"}
_OF_A_CONTAINER = {"overlay", "aufs"}
_ON_A_NETWORK = re.compile(
    r"nfs4?|cifs|smb3|smbfs|afs|9p|lustre|gpfs|beegfs|(fuse\.)?(ceph|ceph-fuse|glusterfs|sshfs)"
)
_OBJECT_STORES = re.compile(r"s3fs|gcsfuse|goofys|geesefs|rclone|mount-?s3|mountpoint-s3|blobfuse")
_LOCKS_OF_ONE_MACHINE = {"nolock", "local_lock=all", "local_lock=posix", "localflock", "nobrl"}
_WITHOUT_BARRIERS = {"nobarrier", "barrier=0", "barrier=none"}


@dataclass(frozen=True)
class Mount:
    """A mounted file system, as a line of /proc/mounts tells it.

    Attributes:
        source: What is mounted: a device, a server's folder, the name of a program.
        point: Where.
        kind: Its type.
        options: How.
    """

    source: str
    point: str
    kind: str
    options: frozenset[str]

    def check(self) -> Iterator[Finding]:
        """Yield what this kind of file system, mounted like this, does not promise."""
        if self.kind.startswith("fuse") and _OBJECT_STORES.search(f"{self.kind} {self.source}"):
            yield _OBJECT_STORE
            return
        if self.kind in _IN_MEMORY:
            yield _finding_in_memory(self.kind)
        if self.kind in _OF_A_CONTAINER:
            yield _CONTAINER
        if _ON_A_NETWORK.fullmatch(self.kind):
            yield _finding_on_a_network(self.kind)
        if self.options & _LOCKS_OF_ONE_MACHINE:
            yield _LOCAL_LOCKS
        if self.options & _WITHOUT_BARRIERS:
            yield _NO_BARRIERS


def mount_of(folder: Path, mounts: str | None = None) -> Mount | None:
    """Return the file system of a folder; None where the system does not tell.

    Args:
        folder: An absolute path.
        mounts: The text of /proc/mounts; None: of this machine.

    Example:
        >>> mount_of(Path("/data/runs"), "/dev/sda / ext4 rw 0 0").kind
        'ext4'
    """
    if mounts is None:
        if not _MOUNTS.is_file():
            return None
        mounts = _MOUNTS.read_text("utf-8", "replace")
    found = [_parse(line) for line in mounts.splitlines() if len(line.split(" ")) >= 4]
    around = [mount for mount in found if folder.is_relative_to(mount.point)]
    longest = max((len(mount.point) for mount in around), default=0)
    # Where two are mounted over each other, the later one is seen.
    return next((mount for mount in reversed(around) if len(mount.point) == longest), None)


def _parse(line: str) -> Mount:
    source, point, kind, options = (_unescaped(word) for word in line.split(" ")[:4])
    return Mount(source, point, kind, frozenset(options.split(",")))


def _unescaped(word: str) -> str:
    return re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), word)


def _finding_in_memory(kind: str) -> Finding:
    return Finding(
        "risk",
        f"the run directory is in memory ({kind})",
        "a run there survives a killed process, but no power cut and no restart of the machine",
        "choose a directory on a disk",
    )


def _finding_on_a_network(kind: str) -> Finding:
    return Finding(
        "risk",
        f"the run directory is on a network file system ({kind})",
        "what fsync and locks promise there is up to the server. unbroken reads each byte back "
        "against its digest before it uses it, so what is lost is found, but it is lost",
        "mount it hard, with locks and without async; or train on a local disk and copy "
        "checkpoints away",
    )


_OBJECT_STORE = Finding(
    "breaks",
    "the run directory is an object store behind a file system",
    "a folder is renamed there file by file, not in one step: a kill in between leaves half a "
    "checkpoint under its final name",
    "train on a local disk and copy checkpoints away",
)
_CONTAINER = Finding(
    "risk",
    "the run directory is inside a container's own layer",
    "it is gone when the container is",
    "mount a volume and train there",
)
_LOCAL_LOCKS = Finding(
    "risk",
    "locks on this file system hold for one machine only",
    "two machines can train in one run directory at once, and neither sees the other",
    "mount it with locks (NFS: without nolock and local_lock), or never start a run twice",
)
_NO_BARRIERS = Finding(
    "risk",
    "the file system is mounted without write barriers",
    "the disk may keep in its own memory what fsync has promised: a power cut can take it",
    "mount it with barriers, unless the disk has a battery",
)


_LITTLE_ROOM = 1_000_000_000
_SYNCS = 5
_TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(1)
"""


@dataclass(frozen=True)
class Disk:
    """What was seen of the file system of a run directory.

    Attributes:
        facts: Names and values, for people.
        findings: What is wrong with it.
    """

    facts: dict[str, str]
    findings: list[Finding]


def check_disk(path: str, *, storage: Callable[[str], Storage] = LocalStorage) -> Disk:
    """Try out the file system of a run directory, in a temporary folder that is removed.

    In a run directory itself nothing is written: it belongs to who holds its lock.

    Args:
        path: The run directory; it need not exist yet.
        storage: Makes a storage in a folder.

    Raises:
        RunDirectoryError: A file stands there.
    """
    folder = _folder_to_try(Path(path).absolute())
    mount = mount_of(folder.resolve())
    facts = {
        "tried in": str(folder),
        "file system": "unknown" if mount is None else f"{mount.kind} on {mount.point}",
    }
    findings = [] if mount is None else list(mount.check())
    try:
        with tempfile.TemporaryDirectory(prefix=".unbroken-doctor-", dir=folder) as inside:
            tried = try_out(storage(inside))
    except OSError as error:
        tried = Disk({}, [_cannot_write(error)])
    return Disk({**facts, **tried.facts}, [*findings, *tried.findings])


def _folder_to_try(path: Path) -> Path:
    """Return the nearest folder on the same file system in which something may be written."""
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        if os.path.lexists(folder):
            raise RunDirectoryError(str(folder), "is not a directory")
    parent = folder.parent
    is_same = parent.stat().st_dev == folder.stat().st_dev
    return parent if is_run(folder) and is_same and os.access(parent, os.W_OK) else folder


def _cannot_write(error: OSError) -> Finding:
    return Finding(
        "breaks",
        f"nothing can be written: {error.strerror or error}",
        "a run needs to write checkpoints",
        "choose another run directory, or its permissions",
    )


def try_out(storage: Storage) -> Disk:
    """Do in an empty storage what a save does."""
    facts: dict[str, str] = {}
    findings: list[Finding] = []
    for name, attempt, why in _ATTEMPTS:
        try:
            facts[name] = attempt(storage)
        except OSError as error:
            facts[name] = f"no: {error.strerror or error}"
            findings.append(_failed(name, error, why))
    return Disk(facts, [*findings, *_check_room(storage)])


def _failed(name: str, error: OSError, why: str) -> Finding:
    severity: Severity = "note" if name in _NOT_NEEDED else "breaks"
    what = f"{name}: {error.strerror or error}"
    return Finding(severity, what, why, "choose a run directory on another file system")


def _sync(storage: Storage) -> str:
    seconds = []
    with storage.create("synced") as file:
        for _ in range(_SYNCS):
            file.write(bytes(4096))
            start = time.perf_counter()
            file.sync()
            seconds.append(time.perf_counter() - start)
    storage.sync_folder("")
    return f"yes, {statistics.median(seconds) * 1e3:.1f} ms for 4 kB"


def _rename(storage: Storage) -> str:
    storage.make_folder("staging")
    for name in ("first", "second"):
        storage.make_folder(f"staging/{name}")
    storage.rename("staging/first", "checkpoint")
    try:
        storage.rename("staging/second", "checkpoint")
    except FileExistsError:
        return "yes"
    raise OSError("replaces what stands there")


def _lock(storage: Storage) -> str:
    held = storage.lock("lock", "unbroken doctor")
    try:
        command = [sys.executable, "-I", "-S", "-c", _TRY_LOCK, storage.describe("lock")]
        other = subprocess.run(command, check=False, stderr=subprocess.DEVNULL)  # noqa: S603
    finally:
        held.release()
    if other.returncode == 0:
        raise OSError("two processes hold one lock")
    return "yes"


def _link(storage: Storage) -> str:
    with storage.create("one name") as file:
        file.write(b"linked")
    storage.link("one name", "two names")
    return "yes"


_ATTEMPTS: tuple[tuple[str, Callable[[Storage], str], str], ...] = (
    ("fsync", _sync, "a power cut could take a checkpoint whose save had returned"),
    ("rename", _rename, "a checkpoint begins to exist by one rename that replaces nothing"),
    ("locks", _lock, "two processes could write into one run"),
    ("hard links", _link, "files that did not change are copied, not linked"),
)
_NOT_NEEDED = {"hard links"}


def _check_room(storage: Storage) -> Iterator[Finding]:
    free = storage.free_bytes()
    if free is None or free >= _LITTLE_ROOM:
        return
    yield Finding(
        "risk",
        f"there is room for only {size_text(free)}",
        "a save that finds no room fails; the checkpoints before it stay as they are",
        "make room, or keep fewer checkpoints (save_total_limit)",
    )
