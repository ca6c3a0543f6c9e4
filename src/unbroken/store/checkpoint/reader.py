"""Read a checkpoint: no byte is returned or counted as good before its digest matched."""

from __future__ import annotations

import errno
import heapq
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Self, TypeVar

from unbroken.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateMismatchError,
)
from unbroken.storage import ReadHandle, Stat, Storage
from unbroken.store.format.canonical_json import Digester
from unbroken.store.format.manifest import (
    MAX_MANIFEST_BYTES,
    Box,
    ByteRun,
    FileEntry,
    Manifest,
    TensorEntry,
    byte_runs,
)
from unbroken.store.format.names import MANIFEST_NAME, PINNED_NAME, rank_of
from unbroken.store.format.safetensors_file import DTYPE_BITS, bytes_of

# A checkpoint's folder on disk, before anything in it is believed.


# Not damage but a process in need, which may read the same bytes well a moment later.
_NOT_THE_FILES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}


class CheckpointFolder:
    """Open the files of one checkpoint, and say what is wrong in the checkpoint's own terms."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage = storage
        self.path = path

    def read_manifest(self) -> Manifest:
        """Return the manifest, which is checked in itself but not against the other files.

        Raises:
            CheckpointNotFoundError: There is no such folder.
            CorruptCheckpointError: The manifest is missing, damaged or impossible.
            NewerFormatError: A newer version of unbroken wrote it.
        """
        with self._open_manifest() as handle:
            if handle.nbytes > MAX_MANIFEST_BYTES:
                expected = f"at most {MAX_MANIFEST_BYTES} bytes"
                raise self.corrupt(MANIFEST_NAME, "is too large", expected, handle.nbytes)
            raw = bytearray(handle.nbytes)
            with self.reading(MANIFEST_NAME):
                handle.read_into(0, memoryview(raw))
        return Manifest.from_bytes(bytes(raw), self.where(MANIFEST_NAME))

    def _open_manifest(self) -> ReadHandle:
        try:
            return self.open(MANIFEST_NAME)
        except CorruptCheckpointError:
            found = self.storage.stat(self.path)
            if found is None:
                raise CheckpointNotFoundError(
                    self.where(""), "there is no such checkpoint"
                ) from None
            if not found.is_folder:
                what = "is not a folder; a symbolic link is not followed"
                raise self.corrupt("", what) from None
            raise

    def open(self, name: str) -> ReadHandle:
        """Open a file of the checkpoint; a missing or unreadable one is corruption."""
        with self.reading(name):
            return self.storage.open(f"{self.path}/{name}")

    @contextmanager
    def reading(self, part: str) -> Iterator[None]:
        """Turn what a disk says of unreadable bytes into the error about the checkpoint."""
        try:
            yield
        except FileNotFoundError:
            raise self.corrupt(part, "is missing") from None
        except EOFError as error:
            raise self.corrupt(part, "ends too early") from error
        except OSError as error:
            if error.errno in _NOT_THE_FILES_FAULT:
                raise
            raise self.corrupt(part, f"cannot be read ({error.strerror})") from error

    def where(self, part: str) -> str:
        """Return how messages call a file or tensor of this checkpoint."""
        return f"{self.path}: {part}" if part else self.storage.describe(self.path)

    def corrupt(
        self, part: str, what: str, expected: object = None, found: object = None
    ) -> CorruptCheckpointError:
        """Return the error that says what is wrong with `part`."""
        hint = "`unbroken verify` lists all damage of a run"
        return CorruptCheckpointError(
            self.where(part), what, expected=expected, found=found, hint=hint
        )


# What one thread reads a checkpoint with.


class ThreadHandles:
    """Open file handles and a scratch buffer for one reader thread."""

    def __init__(self, at: CheckpointFolder) -> None:
        self._at = at
        self._handles: dict[str, ReadHandle] = {}
        self._scratch = memoryview(b"")

    def handle(self, name: str) -> ReadHandle:
        """Return a file of the checkpoint, opened once."""
        if name not in self._handles:
            self._handles[name] = self._at.open(name)
        return self._handles[name]

    def scratch(self, nbytes: int) -> memoryview:
        """Return a buffer that the next call reuses."""
        if len(self._scratch) < nbytes:
            self._scratch = memoryview(bytearray(nbytes))
        return self._scratch[:nbytes]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()


# Several threads that take tasks in turn: while one waits for the disk, another computes.


Task = TypeVar("Task")
Handles = TypeVar("Handles")


def run_in_threads(
    tasks: Sequence[Task],
    handles: Callable[[], AbstractContextManager[Handles]],
    work: Callable[[Handles, Task], None],
    threads: int,
) -> None:
    """Run all tasks in threads, each once; they begin in the order given.

    Args:
        tasks: What is to be done.
        handles: Makes the handles of a thread; no other thread uses them.
        work: Does one task.
        threads: How many work at once; one of them is the caller's.

    Raises:
        BaseException: The error of the first failing task; no later task is begun after it.
    """
    failures: dict[int, BaseException] = {}
    numbers = iter(range(len(tasks)))
    turn = threading.Lock()

    def take_turns() -> None:
        number = len(tasks)
        try:
            with handles() as own:
                while not failures:
                    with turn:
                        number = next(numbers, len(tasks))
                    if number == len(tasks):
                        return
                    work(own, tasks[number])
        except BaseException as error:
            failures[number] = error

    more = [threading.Thread(target=take_turns, daemon=True) for _ in range(threads - 1)]
    for thread in more:
        thread.start()
    take_turns()
    for thread in more:
        thread.join()
    if failures:
        raise failures[min(failures)]


# Dividing the verification of one checkpoint among several readers of the same files.


_WORTH_IT = 64 << 10  # bytes; what is smaller costs nothing, and may be more than numbers

Regions = frozenset[tuple[str, int]]
"""Regions by the name of their file and their number in it."""


def split_verification(manifest: Manifest, ranks: Sequence[int]) -> list[Regions]:
    """Return the large tensors of all files in parts of about equally many bytes.

    What a rank stored in a file of its own it gets, if it is there: it most likely needs it.

    What is smaller than 64 KiB, or no tensor, is in no part: every reader verifies it. A
    tensor has one digest and is never cut: a part may be larger by the largest one. All who have
    the manifest get the same parts.

    Source: the largest first, each to the part with the least so far: R. L. Graham, Bounds on
    Multiprocessing Timing Anomalies, 1969, doi.org/10.1137/0117039.

    Args:
        manifest: What the checkpoint consists of.
        ranks: The ranks that read.

    Example:
        >>> from unbroken.store import FileEntry, Region
        >>> sizes = enumerate((500_000, 900_000, 400_000, 8))
        >>> regions = tuple(Region(0, nbytes, "0" * 32, str(at)) for at, nbytes in sizes)
        >>> entry = FileEntry("a.safetensors", 1_800_008, regions)
        >>> manifest = Manifest(1, "a" * 32, "2026-01-31T12:00:00.000+00:00", (entry,), {})
        >>> [sorted(number for _, number in part) for part in split_verification(manifest, [0, 1])]
        [[1], [0, 2]]
    """
    regions = [
        (region.nbytes, file.name, number)
        for file in manifest.files
        for number, region in enumerate(file.regions)
        if region.path is not None and region.nbytes >= _WORTH_IT
    ]
    taken: list[set[tuple[str, int]]] = [set() for _ in ranks]
    sizes = [0 for _ in ranks]
    rest = []
    for nbytes, name, number in sorted(regions, reverse=True):
        rank = rank_of(name)
        if rank in ranks:
            taken[ranks.index(rank)].add((name, number))
            sizes[ranks.index(rank)] += nbytes
        else:
            rest.append((nbytes, name, number))
    least = [(size, part) for part, size in enumerate(sizes)]
    heapq.heapify(least)
    for nbytes, name, number in rest:
        so_far, part = heapq.heappop(least)
        taken[part].add((name, number))
        heapq.heappush(least, (so_far + nbytes, part))
    return [frozenset(part) for part in taken]


_CHUNK_BYTES = 2 << 20  # of one read: hashed while it is still in the processor's cache
_THREADS = 4  # two compute while two wait for the disk; each has a buffer or two
_WORTH_SEEKING = 64 << 10  # bytes together, of a region that need not be read whole
_WORTH_THREADS = 8 << 20
MAX_WHOLE_BYTES = 1 << 30  # of a file that is read into memory as a whole
_WRONG_SIZE = "has another size"
_WRONG_DIGEST = "is damaged"


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a checkpoint.

    Attributes:
        file: The file, by its name in the checkpoint folder.
        kind: "missing", "size", "digest", "unreadable", or "stray": a file that the manifest
            does not list, which harms nobody who reads by the manifest.
        path: The tensor whose bytes are wrong, or the shard of it; None if it is neither.
        what: The whole story in words.

    Example:
        >>> print(Damage("notes.txt", "stray", None, "is not in the manifest"))
        notes.txt: is not in the manifest
    """

    file: str
    kind: Literal["missing", "size", "digest", "unreadable", "stray"]
    path: str | None
    what: str

    def __str__(self) -> str:
        """Return *file: path: what*."""
        return ": ".join(part for part in (self.file, self.path, self.what) if part)


class CheckpointReader:
    """Read one checkpoint. Its manifest, and the size of every file, are checked at once.

    Extra memory does not grow with the checkpoint: tensors are read straight into the buffer
    that the caller gives, in pieces.

    Args:
        storage: Where the checkpoint is.
        folder: Its folder, of any name: "checkpoint-10".

    Attributes:
        storage: As given.
        folder: As given.
        manifest: What the checkpoint consists of.

    Raises:
        CheckpointNotFoundError: There is no such folder.
        CorruptCheckpointError: The manifest is missing or damaged, or a file has another size.
        NewerFormatError: A newer version of unbroken wrote it.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointWriter
        >>> storage = MemoryStorage()
        >>> writer = CheckpointWriter(storage, step=10, run_id="a" * 32)
        >>> writer.write_file("state.json", b"{}")
        >>> manifest = writer.commit({})
        >>> CheckpointReader(storage, "checkpoint-10").read_file("state.json")
        b'{}'
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage = storage
        self.folder = folder
        self._at = CheckpointFolder(storage, folder)
        self.manifest = self._at.read_manifest()
        self._files = {file.name: file for file in self.manifest.files}
        self._verified: set[tuple[str, int]] = set()  # (file, number of the region)
        self._others: Regions = frozenset()  # what other readers verify
        self._is_stopped = False
        self._check_sizes()

    @property
    def step(self) -> int:
        """How many optimizer steps were completed."""
        return self.manifest.step

    @property
    def nbytes_verified(self) -> int:
        """How many bytes have matched the manifest so far."""
        done = self._verified.copy()  # other threads may go on
        return sum(self._files[name].regions[number].nbytes for name, number in done)

    def look(self) -> tuple[Stat | None, ...]:
        """Return what the storage says of the manifest and each file, without reading them.

        Two equal looks on one machine were at the same files with the same bytes.
        """
        names = (MANIFEST_NAME, *(file.name for file in self.manifest.files))
        return tuple(self.storage.stat(f"{self.folder}/{name}") for name in names)

    def leave_to_others(self, regions: Regions) -> None:
        """Leave the verification of these regions to other readers of the same files.

        They are given out as they are read.
        """
        self._others = regions

    def trust(self, other: CheckpointReader) -> None:
        """Count as verified what another reader of these very files verifies."""
        self._verified = other._verified

    def stop(self) -> None:
        """Make all reads fail from now on, those of other threads included."""
        self._is_stopped = True

    def read_file(self, name: str) -> bytes:
        """Return a whole file whose digest matched.

        Raises:
            CheckpointNotFoundError: The manifest does not list the file.
            CorruptCheckpointError: Its bytes are not those of the manifest, or it is too large.
        """
        file = self._entry(name)
        if file.nbytes > MAX_WHOLE_BYTES:
            expected = f"at most {MAX_WHOLE_BYTES} bytes"
            raise self._at.corrupt(name, "is too large to read whole", expected, file.nbytes)
        data = bytearray(file.nbytes)
        with memoryview(data) as view, ThreadHandles(self._at) as handles:
            for number, region in enumerate(file.regions):
                part = view[region.offset : region.offset + region.nbytes]
                self._read_region(handles, file, number, part)
        return bytes(data)

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        """Read a tensor straight into `buffer`; return only if its digest matched.

        Of a tensor that is left to others, the digest is theirs to compare.

        Args:
            path: The path of the tensor.
            buffer: Writable and contiguous, exactly as many bytes as the tensor has. After an
                error its content is undefined.

        Raises:
            CheckpointNotFoundError: The checkpoint has no such tensor.
            CorruptCheckpointError: The bytes are not those of the manifest.
            StateMismatchError: The buffer has another length.
        """
        with ThreadHandles(self._at) as handles:
            self._read_box(handles, path, None, buffer)

    def read_boxes_into(self, requests: Iterable[tuple[str, Box | None, memoryview]], /) -> None:
        """Read many tensors, as `read_leaf_into` and `read_box_into` do, several at once.

        Args:
            requests: Paths, each with the part that is wanted (None: all of it) and the buffer.

        Raises:
            CorruptCheckpointError: Of several that are damaged, it names the first in the files.
        """
        index = {path: number for number, path in enumerate(self.manifest.tensors)}
        tasks = sorted(requests, key=lambda one: index.get(one[0], -1))
        nbytes = sum(buffer.nbytes for _, _, buffer in tasks)
        self._run_in_threads(tasks, lambda handles, one: self._read_box(handles, *one), nbytes)

    def read_box_into(
        self, path: str, offsets: tuple[int, ...], shape: tuple[int, ...], buffer: memoryview, /
    ) -> None:
        """Read a part of a tensor into `buffer`; return only if all digests matched.

        The shards that hold something of it are read whole, as they are verified whole, but no
        more than a piece of one is kept; others are not touched. Of those whose verification is
        left to others, no more is read than is wanted, where that lies together.

        Args:
            path: The path of the tensor.
            offsets: Where the part starts in the tensor, in elements, by dimension.
            shape: The shape of the part; it must lie within the tensor.
            buffer: Writable and contiguous, exactly as many bytes as the part has: it is filled in
                C order. After an error its content is undefined.

        Raises:
            CheckpointNotFoundError: The checkpoint has no such tensor.
            CorruptCheckpointError: The bytes are not those of the manifest.
            StateMismatchError: The part is not one of the tensor, or the buffer has another length.
        """
        with ThreadHandles(self._at) as handles:
            self._read_box(handles, path, Box(offsets, shape), buffer)

    def _read_box(
        self, handles: ThreadHandles, path: str, box: Box | None, buffer: memoryview
    ) -> None:
        tensor = self.manifest.tensors.get(path)
        if tensor is None:
            raise CheckpointNotFoundError(self._at.where(path), "the checkpoint has no such tensor")
        target = buffer.cast("B") if buffer.nbytes else memoryview(bytearray())
        if box is None and tensor.is_whole and tensor.nbytes == len(target):
            shard = tensor.shards[0]
            self._read_region(handles, self._files[shard.file], shard.number, target)
            return
        whole = Box.whole(tensor.shape)
        part = whole if box is None else box
        self._check_part(tensor, whole, part, len(target))
        for shard in tensor.shards:
            file = self._files[shard.file]
            if shard.box == part:
                self._read_region(handles, file, shard.number, target)
            elif shard.box.overlap(part):
                found = _in_bytes(byte_runs(shard.box, part), DTYPE_BITS[tensor.dtype])
                self._scatter_region(handles, file, shard.number, found, target)

    def _check_part(self, tensor: TensorEntry, whole: Box, part: Box, nbytes: int) -> None:
        where = self._at.where(tensor.path)
        inside = len(part.offsets) == len(part.shape) == len(whole.shape) and (
            not part.numel or part.overlap(whole) == part
        )
        expected = bytes_of(tensor.dtype, part.shape)
        if not inside or expected is None:
            what = "has no such part"
            raise StateMismatchError(where, what, expected=f"a part of {whole}", found=part)
        if nbytes != expected:
            what, found = "has another length", f"a buffer of {nbytes} bytes"
            raise StateMismatchError(where, what, expected=f"{expected} bytes", found=found)

    def check_rest(self) -> None:
        """Check every region that no reading has checked yet.

        When it returns, every byte of every file that is not left to others has matched the
        manifest since this reader was made.

        Raises:
            CorruptCheckpointError: At the first region that does not match.
        """
        done = self._verified | self._others
        rest = [one for one in self._all_regions() if (one[0].name, one[1]) not in done]
        nbytes = sum(file.regions[number].nbytes for file, number in rest)
        self._run_in_threads(
            rest, lambda handles, one: self._read_region(handles, *one, None), nbytes
        )

    def verify(self) -> list[Damage]:
        """Read every byte again, and list all that is wrong instead of stopping at the first.

        Returns:
            The damage, by file and position; "stray" for files that the manifest does not list.
        """
        found: dict[tuple[str, int], Damage] = {}
        regions = self._all_regions()

        def look(handles: ThreadHandles, one: tuple[FileEntry, int]) -> None:
            file, number = one
            try:
                self._check_size(file)
                handles.handle(file.name)
            except CorruptCheckpointError as error:
                found[file.name, -1] = self._as_damage(file.name, None, error)
                return
            try:
                self._read_region(handles, file, number, None)
            except CorruptCheckpointError as error:
                name = file.regions[number].name
                found[file.name, number] = self._as_damage(file.name, name, error)

        self._run_in_threads(regions, look, sum(file.nbytes for file in self.manifest.files))
        listed = {file.name for file in self.manifest.files} | {MANIFEST_NAME, PINNED_NAME}
        strays = sorted(set(self.storage.list(self.folder)) - listed)
        damaged = [found[number] for number in sorted(found)]
        return damaged + [Damage(name, "stray", None, "is not in the manifest") for name in strays]

    def _all_regions(self) -> list[tuple[FileEntry, int]]:
        return [(file, n) for file in self.manifest.files for n in range(len(file.regions))]

    def _as_damage(self, name: str, path: str | None, error: CorruptCheckpointError) -> Damage:
        kind: Literal["missing", "size", "digest", "unreadable"] = "unreadable"
        if self.storage.stat(f"{self.folder}/{name}") is None:
            kind = "missing"
        elif error.what == _WRONG_SIZE:
            kind = "size"
        elif error.what == _WRONG_DIGEST:
            kind = "digest"
        what = f"{error.what}: expected {error.expected}, found {error.found}"
        return Damage(name, kind, path, what if error.expected is not None else error.what)

    def _check_sizes(self) -> None:
        for file in self.manifest.files:
            self._check_size(file)

    def _check_size(self, file: FileEntry) -> None:
        found = self.storage.stat(f"{self.folder}/{file.name}")
        if found is None:
            raise self._at.corrupt(file.name, "is missing")
        if found.is_folder:
            raise self._at.corrupt(file.name, "is a folder")
        if found.nbytes != file.nbytes:
            raise self._at.corrupt(
                file.name, _WRONG_SIZE, f"{file.nbytes} bytes", f"{found.nbytes} bytes"
            )

    def _entry(self, name: str) -> FileEntry:
        if name not in self._files:
            raise CheckpointNotFoundError(self._at.where(name), "the checkpoint has no such file")
        return self._files[name]

    def _run_in_threads(
        self, tasks: Sequence[Task], work: Callable[[ThreadHandles, Task], None], nbytes: int
    ) -> None:
        threads = min(len(tasks), _THREADS) if nbytes >= _WORTH_THREADS else 1
        run_in_threads(tasks, lambda: ThreadHandles(self._at), work, threads)

    def _read_region(
        self, handles: ThreadHandles, file: FileEntry, number: int, target: memoryview | None
    ) -> None:
        """Read a region into `target`, or past a scratch buffer, and compare its digest."""
        for _ in self._pieces(handles, file, number, target):
            pass

    def _scatter_region(
        self,
        handles: ThreadHandles,
        file: FileEntry,
        number: int,
        found: Iterator[ByteRun],
        target: memoryview,
    ) -> None:
        """Read a region past a scratch buffer, and copy runs of bytes out of it."""
        run = next(found, None)
        if (file.name, number) in self._others and run and run.length >= _WORTH_SEEKING:
            region, handle = file.regions[number], handles.handle(file.name)
            for at, to, length in chain([run], found):  # all are as long as the first
                with self._at.reading(region.name or file.name):
                    handle.read_into(region.offset + at, target[to : to + length])
            return
        for start, piece in self._pieces(handles, file, number, None):
            stop = start + len(piece)
            while run is not None and run.source < stop:
                length = min(run.length, stop - run.source)
                at = run.source - start
                target[run.target : run.target + length] = piece[at : at + length]
                rest = ByteRun(stop, run.target + length, run.length - length)
                run = rest if rest.length else next(found, None)

    def _pieces(
        self, handles: ThreadHandles, file: FileEntry, number: int, target: memoryview | None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield a region in pieces, with their offsets in it, and compare its digest at the end."""
        region = file.regions[number]
        where = region.path or file.name
        if region.offsets is not None:
            where = f"{file.name}: {region.name}"
        handle = handles.handle(file.name)
        digester = None if (file.name, number) in self._others else Digester()
        for start in range(0, region.nbytes, _CHUNK_BYTES):
            if self._is_stopped:
                raise self._at.corrupt(where, "is read no longer")
            stop = min(start + _CHUNK_BYTES, region.nbytes)
            piece = handles.scratch(stop - start) if target is None else target[start:stop]
            with self._at.reading(where):
                handle.read_into(region.offset + start, piece)
            if digester is not None:
                digester.update(piece)
            yield start, piece
        if digester is None:
            return
        if digester.digest() != region.digest:
            raise self._at.corrupt(
                where, _WRONG_DIGEST, f"digest {region.digest}", f"digest {digester.digest()}"
            )
        self._verified.add((file.name, number))


def _in_bytes(found: Iterator[ByteRun], bits: int) -> Iterator[ByteRun]:
    """Return runs of elements as runs of bytes; types of less than a byte are never cut."""
    return (ByteRun(*(part * bits // 8 for part in run)) for run in found)


# Remembering which checkpoints this process has read whole, so that it reads each once.


class VerifiedCache:
    """Knows the checkpoints that were intact when this process read every byte of them.

    One that was touched since (the size, time or identity of any file) is read again.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointWriter, CheckpointReader
        >>> storage = MemoryStorage()
        >>> manifest = CheckpointWriter(storage, step=5, run_id="a" * 32).commit({})
        >>> VerifiedCache().problem_of(CheckpointReader(storage, "checkpoint-5")) is None
        True
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Stat | None, ...]] = {}

    def problem_of(self, reader: CheckpointReader) -> str | None:
        """Return what is wrong with a checkpoint, or None if it is intact."""
        look = reader.look()
        if self._seen.get(reader.folder) == look:
            return None
        try:
            reader.check_rest()
        except CheckpointError as error:
            self._seen.pop(reader.folder, None)
            return str(error)
        self._seen[reader.folder] = look
        return None
