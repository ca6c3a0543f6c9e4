"""What the doctor tries out on a machine: whether a disk keeps its promises, and training its bits.

Tried, not believed: a commit relies on what the file system under a run directory does, and a
resume on that a training repeats its own bits.
"""

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
from typing import Literal

import torch
from torch import nn

from unbroken.cli.run_paths import is_run
from unbroken.cli.tables import size_text
from unbroken.errors import RunDirectoryError, UnbrokenError
from unbroken.storage import LocalStorage, Storage
from unbroken.store.format.canonical_json import Digester
from unbroken.training.setup import deterministic_kernels

Severity = Literal["breaks", "risk", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor has found, and what to do about it.

    Attributes:
        severity: "breaks": the same run would not have the same bits here, or would be lost;
            "risk": it would in some circumstances, which `why` names; "note": good to know.
        what: What was found.
        why: Why it matters.
        remedy: What to do about it.
    """

    severity: Severity
    what: str
    why: str
    remedy: str


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Return the findings by severity; equal ones stay as they come.

    Example:
        >>> found = [Finding("note", "a", "", ""), Finding("breaks", "b", "", "")]
        >>> [finding.what for finding in by_severity(found)]
        ['b', 'a']
    """
    order = ("breaks", "risk", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


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
    """A mounted file system, as a line of /proc/mounts describes it.

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
    """Return the file system of a folder; None where the system does not say.

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


# Whether the file system does what a save needs.


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


# A small training, done again and again: are the bits the same?


_STEPS, _BATCH, _LENGTH, _WORDS, _WIDTH = 3, 64, 64, 64, 32
_IN_A_PROCESS = "from unbroken.cli.trials import train; print(train('{device}'))"

Train = Callable[[str], str]
"""From the name of a device to the digest of a model that was trained on it."""


@dataclass(frozen=True)
class Experiment:
    """What an experiment has shown.

    Attributes:
        question: What was asked.
        device: Where: "cpu" or "cuda".
        yes: The answer.
        expected: The answer that bit-exactness needs; None: both are fine.
    """

    question: str
    device: str
    yes: bool
    expected: bool | None

    def findings(self) -> Iterator[Finding]:
        """Yield what follows from the answer."""
        if self.expected is None or self.yes == self.expected:
            return
        yield Finding(
            "breaks",
            f"{self.device}: {self.question}: {'yes' if self.yes else 'no'}",
            "a small training, with deterministic kernels and the same seeds, did not repeat its "
            "own bits here: nor will a larger one",
            "try torch's newest release and driver; an unstable or overclocked processor or memory "
            "also shows like this",
        )


def train(device: str) -> str:
    """Train a small model for a few steps; return the digest of all its parameters.

    Embedding, normalisation, products, dropout, loss, backward and AdamW, with deterministic
    kernels, large enough that more than one thread takes part.

    Args:
        device: "cpu" or "cuda".
    """
    with deterministic_kernels(True, torch.device(device)):
        torch.manual_seed(0)
        model = _make_model().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(_STEPS):
            words = torch.randint(_WORDS, (_BATCH, _LENGTH)).to(device)
            predicted = model(words).flatten(0, 1)
            loss = nn.functional.cross_entropy(predicted, words.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return _digest(model)


def _make_model() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(_WORDS, _WIDTH),
        nn.LayerNorm(_WIDTH),
        nn.Linear(_WIDTH, 4 * _WIDTH),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(4 * _WIDTH, _WIDTH),
        nn.LayerNorm(_WIDTH),
        nn.Linear(_WIDTH, _WORDS),
    )


def _digest(model: nn.Module) -> str:
    digester = Digester()
    for parameter in model.parameters():
        digester.update(parameter.detach().cpu().numpy().tobytes())
    return digester.digest()


def train_in_a_process(device: str) -> str:
    """Do `train` in a fresh process.

    Raises:
        UnbrokenError: It failed there.
    """
    command = [sys.executable, "-c", _IN_A_PROCESS.format(device=device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        found = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise UnbrokenError(f"training in a fresh process on {device}", "failed", found=found)
    return done.stdout.strip()


def run_experiments(
    *, cores: int, thorough: bool, train: Train = train, train_in_child: Train = train_in_a_process
) -> list[Experiment]:
    """Train on each kind of device, and answer whether the bits are the same.

    Args:
        cores: How many this process may use.
        thorough: Also in two fresh processes.
        train: What to repeat in this process.
        train_in_child: What to repeat in others.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    answers = []
    for device in devices:
        here = [train(device) for _ in range(2)]
        answers.append(Experiment("the same bits twice", device, len({*here}) == 1, expected=True))
        if thorough:
            all_of_them = {*here, train_in_child(device), train_in_child(device)}
            question = "the same bits in two other processes"
            answers.append(Experiment(question, device, len(all_of_them) == 1, expected=True))
    return [*answers, *_threads(train, cores)]


def _threads(train: Train, cores: int) -> Iterator[Experiment]:
    threads = torch.get_num_threads()
    others = threads if threads > 1 else cores
    if others == 1:
        return  # nothing to compare with
    try:
        torch.set_num_threads(1)
        alone = train("cpu")
        torch.set_num_threads(others)
        together = train("cpu")
    finally:
        torch.set_num_threads(threads)
    question = f"depends on the number of threads (1 or {others})"
    yield Experiment(question, "cpu", alone != together, expected=None)
