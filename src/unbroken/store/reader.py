"""Reading a checkpoint: no byte is given out, or counted as good, before its digest matched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from unbroken.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateMismatchError,
)
from unbroken.storage import ReadHandle, Stat, Storage
from unbroken.store.boxes import Box, Run, runs
from unbroken.store.checkpoint_folder import CheckpointFolder
from unbroken.store.digest import Digester
from unbroken.store.division import Regions
from unbroken.store.layout import MANIFEST_NAME, PINNED_NAME
from unbroken.store.manifest import FileEntry
from unbroken.store.safetensors import DTYPE_BITS, bytes_of
from unbroken.store.shards import TensorEntry

_CHUNK_BYTES = 4 << 20  # of one read: hashed while it is still in the processor's cache
_MAX_WHOLE_BYTES = 1 << 30  # of a file that is read into memory as a whole
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
        self._scratch = memoryview(b"")
        self._check_sizes()

    @property
    def step(self) -> int:
        """How many optimizer steps were completed."""
        return self.manifest.step

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

    def read_file(self, name: str) -> bytes:
        """Return a whole file whose digest matched.

        Raises:
            CheckpointNotFoundError: The manifest does not list the file.
            CorruptCheckpointError: Its bytes are not those of the manifest, or it is too large.
        """
        file = self._entry(name)
        if file.nbytes > _MAX_WHOLE_BYTES:
            expected = f"at most {_MAX_WHOLE_BYTES} bytes"
            raise self._at.corrupt(name, "is too large to read whole", expected, file.nbytes)
        data = bytearray(file.nbytes)
        with memoryview(data) as view, self._at.open(name) as handle:
            for number, region in enumerate(file.regions):
                part = view[region.offset : region.offset + region.nbytes]
                self._read_region(handle, file, number, part)
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
        self._read_box(path, None, buffer)

    def read_box_into(
        self, path: str, offsets: tuple[int, ...], shape: tuple[int, ...], buffer: memoryview, /
    ) -> None:
        """Read a part of a tensor into `buffer`; return only if all digests matched.

        The shards that hold something of it are read whole, as they are verified whole, but no
        more than a piece of one is kept; others are not touched.

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
        self._read_box(path, Box(offsets, shape), buffer)

    def _read_box(self, path: str, box: Box | None, buffer: memoryview) -> None:
        tensor = self.manifest.tensors.get(path)
        if tensor is None:
            raise CheckpointNotFoundError(self._at.where(path), "the checkpoint has no such tensor")
        whole = Box.whole(tensor.shape)
        wanted = whole if box is None else box
        target = buffer.cast("B") if buffer.nbytes else memoryview(bytearray())
        self._check_part(tensor, whole, wanted, len(target))
        for shard in tensor.shards:
            file = self._files[shard.file]
            if shard.box == wanted:
                with self._at.open(file.name) as handle:
                    self._read_region(handle, file, shard.number, target)
            elif shard.box.overlap(wanted):
                found = _in_bytes(runs(shard.box, wanted), DTYPE_BITS[tensor.dtype])
                with self._at.open(file.name) as handle:
                    self._scatter_region(handle, file, shard.number, found, target)

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
        for file in self.manifest.files:
            rest = [n for n in range(len(file.regions)) if (file.name, n) not in done]
            if rest:
                with self._at.open(file.name) as handle:
                    for number in rest:
                        self._read_region(handle, file, number, None)

    def verify(self) -> list[Damage]:
        """Read every byte again, and list all that is wrong instead of stopping at the first.

        Returns:
            The damage, by file and place; "stray" for files that the manifest does not list.
        """
        found: list[Damage] = []
        for file in self.manifest.files:
            found += self._damage_of(file)
        listed = {file.name for file in self.manifest.files} | {MANIFEST_NAME, PINNED_NAME}
        strays = sorted(set(self.storage.list(self.folder)) - listed)
        return found + [Damage(name, "stray", None, "is not in the manifest") for name in strays]

    def _damage_of(self, file: FileEntry) -> list[Damage]:
        try:
            self._check_size(file)
            handle = self._at.open(file.name)
        except CorruptCheckpointError as error:
            return [self._as_damage(file.name, None, error)]
        found = []
        with handle:
            for number, region in enumerate(file.regions):
                try:
                    self._read_region(handle, file, number, None)
                except CorruptCheckpointError as error:
                    found.append(self._as_damage(file.name, region.name, error))
        return found

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

    def _read_region(
        self, handle: ReadHandle, file: FileEntry, number: int, target: memoryview | None
    ) -> None:
        """Read a region into `target`, or past a scratch buffer, and compare its digest."""
        for _ in self._pieces(handle, file, number, target):
            pass

    def _scatter_region(
        self,
        handle: ReadHandle,
        file: FileEntry,
        number: int,
        found: Iterator[Run],
        target: memoryview,
    ) -> None:
        """Read a region past a scratch buffer, and copy runs of bytes out of it."""
        run = next(found, None)
        for start, piece in self._pieces(handle, file, number, None):
            stop = start + len(piece)
            while run is not None and run.source < stop:
                length = min(run.length, stop - run.source)
                at = run.source - start
                target[run.target : run.target + length] = piece[at : at + length]
                rest = Run(stop, run.target + length, run.length - length)
                run = rest if rest.length else next(found, None)

    def _pieces(
        self, handle: ReadHandle, file: FileEntry, number: int, target: memoryview | None
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield a region in pieces, with their places in it, and compare its digest at the end."""
        region = file.regions[number]
        where = region.path or file.name
        if region.offsets is not None:
            where = f"{file.name}: {region.name}"
        digester = None if (file.name, number) in self._others else Digester()
        for start in range(0, region.nbytes, _CHUNK_BYTES):
            stop = min(start + _CHUNK_BYTES, region.nbytes)
            piece = self._scratch_of(stop - start) if target is None else target[start:stop]
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

    def _scratch_of(self, nbytes: int) -> memoryview:
        if len(self._scratch) < nbytes:
            self._scratch = memoryview(bytearray(nbytes))
        return self._scratch[:nbytes]


def _in_bytes(found: Iterator[Run], bits: int) -> Iterator[Run]:
    """Return runs of elements as runs of bytes; types of less than a byte are never cut."""
    return (Run(*(part * bits // 8 for part in run)) for run in found)
