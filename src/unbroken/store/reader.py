"""Reading a checkpoint: no byte is given out, or counted as good, before its digest matched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from unbroken.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateMismatchError,
)
from unbroken.storage import Stat, Storage
from unbroken.store.boxes import Box, Run, runs
from unbroken.store.checkpoint_folder import CheckpointFolder
from unbroken.store.desk import Desk
from unbroken.store.digest import Digester
from unbroken.store.division import Regions
from unbroken.store.layout import MANIFEST_NAME, PINNED_NAME
from unbroken.store.manifest import FileEntry
from unbroken.store.safetensors import DTYPE_BITS, bytes_of
from unbroken.store.shards import TensorEntry
from unbroken.store.side_by_side import Task, side_by_side

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
        """Verify these regions no longer: other readers of these very files do.

        They are given out as they are read.
        """
        self._others = regions

    def trust(self, other: CheckpointReader) -> None:
        """Count as verified what another reader of these very files verifies."""
        self._verified = other._verified

    def stop(self) -> None:
        """Let the reading that other threads are at, and all later one, end in an error."""
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
        with memoryview(data) as view, Desk(self._at) as desk:
            for number, region in enumerate(file.regions):
                part = view[region.offset : region.offset + region.nbytes]
                self._read_region(desk, file, number, part)
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
        with Desk(self._at) as desk:
            self._read_box(desk, path, None, buffer)

    def read_boxes_into(self, wanted: Iterable[tuple[str, Box | None, memoryview]], /) -> None:
        """Read many tensors, as `read_leaf_into` and `read_box_into` do, several at once.

        Args:
            wanted: Paths, each with the part that is wanted (None: all of it) and the buffer.

        Raises:
            CorruptCheckpointError: Of several that are damaged, it names the first in the files.
        """
        place = {path: number for number, path in enumerate(self.manifest.tensors)}
        tasks = sorted(wanted, key=lambda one: place.get(one[0], -1))
        nbytes = sum(buffer.nbytes for _, _, buffer in tasks)
        self._side_by_side(tasks, lambda desk, one: self._read_box(desk, *one), nbytes)

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
        with Desk(self._at) as desk:
            self._read_box(desk, path, Box(offsets, shape), buffer)

    def _read_box(self, desk: Desk, path: str, box: Box | None, buffer: memoryview) -> None:
        tensor = self.manifest.tensors.get(path)
        if tensor is None:
            raise CheckpointNotFoundError(self._at.where(path), "the checkpoint has no such tensor")
        target = buffer.cast("B") if buffer.nbytes else memoryview(bytearray())
        if box is None and tensor.is_whole and tensor.nbytes == len(target):
            shard = tensor.shards[0]
            self._read_region(desk, self._files[shard.file], shard.number, target)
            return
        whole = Box.whole(tensor.shape)
        wanted = whole if box is None else box
        self._check_part(tensor, whole, wanted, len(target))
        for shard in tensor.shards:
            file = self._files[shard.file]
            if shard.box == wanted:
                self._read_region(desk, file, shard.number, target)
            elif shard.box.overlap(wanted):
                found = _in_bytes(runs(shard.box, wanted), DTYPE_BITS[tensor.dtype])
                self._scatter_region(desk, file, shard.number, found, target)

    def _check_part(self, tensor: TensorEntry, whole: Box, wanted: Box, nbytes: int) -> None:
        where = self._at.where(tensor.path)
        inside = len(wanted.offsets) == len(wanted.shape) == len(whole.shape) and (
            not wanted.numel or wanted.overlap(whole) == wanted
        )
        expected = bytes_of(tensor.dtype, wanted.shape)
        if not inside or expected is None:
            what = "has no such part"
            raise StateMismatchError(where, what, expected=f"a part of {whole}", found=wanted)
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
        self._side_by_side(rest, lambda desk, one: self._read_region(desk, *one, None), nbytes)

    def verify(self) -> list[Damage]:
        """Read every byte again, and list all that is wrong instead of stopping at the first.

        Returns:
            The damage, by file and place; "stray" for files that the manifest does not list.
        """
        found: dict[tuple[str, int], Damage] = {}
        regions = self._all_regions()

        def look(desk: Desk, one: tuple[FileEntry, int]) -> None:
            file, number = one
            try:
                self._check_size(file)
                desk.handle(file.name)
            except CorruptCheckpointError as error:
                found[file.name, -1] = self._as_damage(file.name, None, error)
                return
            try:
                self._read_region(desk, file, number, None)
            except CorruptCheckpointError as error:
                name = file.regions[number].name
                found[file.name, number] = self._as_damage(file.name, name, error)

        self._side_by_side(regions, look, sum(file.nbytes for file in self.manifest.files))
        listed = {file.name for file in self.manifest.files} | {MANIFEST_NAME, PINNED_NAME}
        strays = sorted(set(self.storage.list(self.folder)) - listed)
        damaged = [found[place] for place in sorted(found)]
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

    def _side_by_side(
        self, tasks: Sequence[Task], work: Callable[[Desk, Task], None], nbytes: int
    ) -> None:
        threads = min(len(tasks), _THREADS) if nbytes >= _WORTH_THREADS else 1
        side_by_side(tasks, lambda: Desk(self._at), work, threads)

    def _read_region(
        self, desk: Desk, file: FileEntry, number: int, target: memoryview | None
    ) -> None:
        """Read a region into `target`, or past a scratch buffer, and compare its digest."""
        for _ in self._pieces(desk, file, number, target):
            pass

    def _scatter_region(
        self,
        desk: Desk,
        file: FileEntry,
        number: int,
        found: Iterator[Run],
        target: memoryview,
    ) -> None:
        """Read a region past a scratch buffer, and copy runs of bytes out of it."""
        run = next(found, None)
        if (file.name, number) in self._others and run and run.length >= _WORTH_SEEKING:
            region, handle = file.regions[number], desk.handle(file.name)
            for at, to, length in chain([run], found):  # all are as long as the first
                with self._at.reading(region.name or file.name):
                    handle.read_into(region.offset + at, target[to : to + length])
            return
        for start, piece in self._pieces(desk, file, number, None):
            stop = start + len(piece)
            while run is not None and run.source < stop:
                length = min(run.length, stop - run.source)
                at = run.source - start
                target[run.target : run.target + length] = piece[at : at + length]
                rest = Run(stop, run.target + length, run.length - length)
                run = rest if rest.length else next(found, None)

    def _pieces(
        self, desk: Desk, file: FileEntry, number: int, target: memoryview | None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield a region in pieces, with their places in it, and compare its digest at the end."""
        region = file.regions[number]
        where = region.path or file.name
        if region.offsets is not None:
            where = f"{file.name}: {region.name}"
        handle = desk.handle(file.name)
        digester = None if (file.name, number) in self._others else Digester()
        for start in range(0, region.nbytes, _CHUNK_BYTES):
            if self._is_stopped:
                raise self._at.corrupt(where, "is read no longer")
            stop = min(start + _CHUNK_BYTES, region.nbytes)
            piece = desk.scratch(stop - start) if target is None else target[start:stop]
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


def _in_bytes(found: Iterator[Run], bits: int) -> Iterator[Run]:
    """Return runs of elements as runs of bytes; types of less than a byte are never cut."""
    return (Run(*(part * bits // 8 for part in run)) for run in found)
