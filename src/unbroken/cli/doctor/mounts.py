"""Which file system a folder is on, and what that kind of file system does not promise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from unbroken.cli.doctor.finding import Finding

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
