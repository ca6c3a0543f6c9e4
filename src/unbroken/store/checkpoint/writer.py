"""Write a checkpoint: all of it becomes visible at `commit`, or nothing does."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from unbroken.errors import CaptureError, LockHeldError, SaveError
from unbroken.storage import Storage
from unbroken.store.checkpoint.commit import (
    commit_staging,
    ensure_folder,
    free_name,
    remove_staging,
)
from unbroken.store.checkpoint.reader import MAX_WHOLE_BYTES, CheckpointReader
from unbroken.store.format.canonical_json import (
    Digester,
    Json,
    MalformedError,
    digest_of,
    from_strict,
    to_canonical,
)
from unbroken.store.format.manifest import (
    FileEntry,
    Manifest,
    Region,
    least_nbytes,
    refuse_too_large,
)
from unbroken.store.format.names import STAGING, checkpoint_name, is_file_name
from unbroken.store.format.safetensors_file import Leaf, header_of, in_file_order

# Writing the files of a checkpoint into its staging folder, hashed on the way.


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PIECE_BYTES = 1 << 20  # hashed and handed on while it is in the processor's cache


@dataclass(frozen=True)
class FilePlan:
    """A safetensors file before it is written: its header, and its leaves in file order."""

    name: str
    header: bytes
    leaves: Sequence[Leaf]


def plan_files(leaves: Iterable[Leaf]) -> list[FilePlan]:
    """Return the files that hold the leaves; everything about them is checked before a write.

    Raises:
        CaptureError: A leaf has a name, type, shape or length that no file can hold.
    """
    by_file: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_file.setdefault(leaf.file, []).append(leaf)
    plans = []
    for name in sorted(by_file):
        ordered = in_file_order(by_file[name])
        plans.append(FilePlan(name, header_of(ordered), ordered))
    return plans


def offsets_in_files(leaves: Iterable[Leaf], page: int) -> tuple[dict[str, int], int]:
    """Return offsets for the bytes of leaves in one memory, and its length, by their paths.

    Each file begins at a multiple of `page`, and its leaves lie as they do in the file.

    Raises:
        CaptureError: A leaf has a name, type, shape or length that no file can hold.
    """
    offsets, end = {}, 0
    for plan in plan_files(leaves):
        end += len(plan.header)
        for leaf in plan.leaves:
            offsets[leaf.path] = end
            end += leaf.nbytes
        end += -end % page
    return offsets, end


def write_plan(storage: Storage, folder: str, plan: FilePlan) -> FileEntry:
    """Write a safetensors file, durably, and return what the manifest will say of it."""
    nbytes = len(plan.header) + sum(leaf.nbytes for leaf in plan.leaves)
    digests: list[str] = []
    with storage.create(f"{folder}/{plan.name}", nbytes) as file:
        file.write(plan.header)
        for piece in _pieces(plan.leaves, digests):
            file.write(piece)
        file.sync()
    regions = [Region(0, len(plan.header), digest_of(plan.header))]
    end = len(plan.header)
    for leaf, digest in zip(plan.leaves, digests, strict=True):
        regions.append(_region(end, digest, leaf))
        end += leaf.nbytes
    return FileEntry(plan.name, end, tuple(regions))


def _region(offset: int, digest: str, leaf: Leaf) -> Region:
    return Region(
        offset,
        leaf.nbytes,
        digest,
        leaf.path,
        leaf.dtype,
        leaf.shape,
        leaf.offsets,
        leaf.global_shape,
    )


def link_plan(
    storage: Storage, folder: str, plan: FilePlan, like: CheckpointReader
) -> FileEntry | None:
    """Link a file of an earlier checkpoint that has the very same bytes; None if there is none.

    Args:
        storage: Where both checkpoints are.
        folder: The staging folder.
        plan: The file to write.
        like: The earlier checkpoint. Its bytes are not read: it must be known to be intact.
    """
    known = next((file for file in like.manifest.files if file.name == plan.name), None)
    if known is None or not _is_same(known, plan):
        return None
    try:
        storage.link(f"{like.folder}/{plan.name}", f"{folder}/{plan.name}")
    except OSError:  # this disk knows no links, or has too many to this file
        return None
    return known


def _is_same(known: FileEntry, plan: FilePlan) -> bool:
    """Compare digests, those of the smallest tensors first: one that differs is enough."""
    header, *regions = known.regions
    if header.digest != digest_of(plan.header) or len(regions) != len(plan.leaves):
        return False
    pairs = sorted(zip(plan.leaves, regions, strict=True), key=lambda pair: pair[0].nbytes)
    return all(
        (leaf.path, leaf.nbytes) == (region.path, region.nbytes)
        and _digest_of_leaf(leaf) == region.digest
        for leaf, region in pairs
    )


def _digest_of_leaf(leaf: Leaf) -> str:
    if leaf.copied is not None:
        return leaf.copied.digest
    digester = Digester()
    for chunk in leaf.chunks():
        digester.update(chunk)
    return digester.digest()


def _pieces(leaves: Iterable[Leaf], digests: list[str]) -> Iterator[memoryview]:
    """Yield the bytes of leaves, and add their digests; copies that adjoin come as one piece."""
    memory, start, end = memoryview(b""), 0, 0  # copies to be written
    for leaf in leaves:
        copied = leaf.copied
        if copied is None or copied.memory is not memory or copied.start != end:
            yield memory[start:end]
            memory, start, end = memoryview(b""), 0, 0
        if copied is None:
            digests.append((yield from _pieces_of(leaf)))
            continue
        start = start if copied.memory is memory else copied.start
        memory, end = copied.memory, copied.start + leaf.nbytes
        digests.append(copied.digest)
    yield memory[start:end]


def _pieces_of(leaf: Leaf) -> Generator[memoryview, None, str]:
    """Yield the bytes of a leaf; return their digest."""
    digester = Digester()
    written = 0
    for chunk in leaf.chunks():
        for start in range(0, chunk.nbytes, _PIECE_BYTES):
            piece = chunk[start : start + _PIECE_BYTES]
            digester.update(piece)
            yield piece
        written += chunk.nbytes
    if written != leaf.nbytes:
        what = "gives another number of bytes than it said"
        raise CaptureError(leaf.path, what, expected=leaf.nbytes, found=written)
    return digester.digest()


def write_plain(storage: Storage, folder: str, name: str, data: bytes) -> FileEntry:
    """Write a file as it is, durably, and return what the manifest will say of it.

    Raises:
        CaptureError: It is longer than a reader takes.
    """
    if len(data) > MAX_WHOLE_BYTES:
        what, expected = "is too large to be read back", f"at most {MAX_WHOLE_BYTES} bytes"
        hint = "keep large values as tensors, which stand in files of their own"
        raise CaptureError(name, what, expected=expected, found=len(data), hint=hint)
    with storage.create(f"{folder}/{name}") as file:
        file.write(data)
        file.sync()
    return FileEntry(name, len(data), (Region(0, len(data), digest_of(data)),))


def check_new_names(names: Iterable[str], taken: Iterable[str]) -> None:
    """Refuse file names that a manifest cannot list, or that mean one file on some disk.

    Raises:
        CaptureError: `where` is the name.
    """
    seen = {name.casefold() for name in taken}
    for name in names:
        if not is_file_name(name):
            raise CaptureError(name, "is not a name that a checkpoint's file can have")
        if name.casefold() in seen:
            raise CaptureError(name, "is already the name of a file of this checkpoint")
        seen.add(name.casefold())


def store_leaves(
    storage: Storage, folder: str, leaves: Iterable[Leaf], files: Mapping[str, bytes]
) -> tuple[FileEntry, ...]:
    """Write leaves and files, durably, into the staging folder of another rank's writer.

    Args:
        storage: The run directory, as this rank sees it.
        folder: `CheckpointWriter.staging` of the rank that commits.
        leaves: What this rank stores. No other rank may store into the same files.
        files: Files that are not tensors, by name.

    Returns:
        What that rank's `CheckpointWriter.adopt` needs to know.

    Raises:
        CaptureError: A leaf's path, name, type, shape or length is impossible.
        SaveError: The storage fails or is full.
    """
    plans = plan_files(leaves)
    check_new_names([*(plan.name for plan in plans), *files], ())
    try:
        stored = [write_plan(storage, folder, plan) for plan in plans]
        stored += [write_plain(storage, folder, name, data) for name, data in files.items()]
        if stored:
            storage.sync_folder(folder)
    except OSError as error:
        raise save_error(error, storage.describe(folder)) from error
    return tuple(stored)


def save_error(error: OSError, where: str) -> SaveError:
    """Turn an error of the disk into the error about the save."""
    if isinstance(error, SaveError):
        return error
    saved = "all earlier checkpoints are as they were"
    hint = f"make room, then save again; {saved}" if error.errno in _NO_ROOM else saved
    path = str(error.filename or where)
    failure = SaveError(path, "cannot be written", found=str(error.strerror), hint=hint)
    failure.errno = error.errno
    return failure


_LEAST_OF_REGION = 90  # digest, lengths and the names of fields, in a manifest


class CheckpointWriter:
    """Write one checkpoint: everything becomes a checkpoint at `commit`, or nothing does.

    Until `commit` returns, all earlier checkpoints are as they were, whatever fails or is
    killed. The first failure ends the attempt: its files are removed as far as the disk allows,
    and a new writer may try again.

    Args:
        storage: The run directory.
        step: How many optimizer steps were completed.
        run_id: The run that writes it.
        clock: Seconds since 1970; for the date in the manifest only.
        like: An earlier checkpoint, known to be intact, whose files may be linked.
        constant: Names of files that are linked from there if not one bit of them has changed.
        require_ownership: Raises if this process may not commit; called just before it does.

    Raises:
        SaveError: The staging folder cannot be made.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> storage = MemoryStorage()
        >>> with CheckpointWriter(storage, step=10, run_id="a" * 32) as writer:
        ...     writer.write_file("state.json", b"{}")
        ...     manifest = writer.commit({"loss": 0.5})
        >>> storage.list("checkpoint-10")
        ['manifest.json', 'state.json']
    """

    def __init__(
        self,
        storage: Storage,
        *,
        step: int,
        run_id: str,
        clock: Callable[[], float] = time.time,
        like: CheckpointReader | None = None,
        constant: Collection[str] = (),
        require_ownership: Callable[[], None] = lambda: None,
    ) -> None:
        self._require_ownership = require_ownership
        self._like = like
        self._constant = constant
        self._storage = storage
        self._step = step
        self._run_id = run_id
        self._clock = clock
        self._files: dict[str, FileEntry] = {}
        self._paths: set[tuple[str, tuple[int, ...] | None]] = set()
        self._facts: Mapping[str, Json] = {}
        self._least_nbytes = 0  # of the manifest
        self._is_over = False
        self._folder: str | None = None
        with self._attempt():
            self._folder = self._make_staging()

    def expect(self, facts: Mapping[str, Json]) -> None:
        """Refuse what `commit` could not commit, before anything is written.

        Raises:
            CaptureError: The manifest would be larger than any reader takes.
        """
        with self._attempt():
            self._facts, self._least_nbytes = facts, least_nbytes(facts)
            refuse_too_large(facts, (), self._least_nbytes)

    def _count(self, leaves: Iterable[Leaf]) -> None:
        """Count the least size of leaves in the manifest; raise if that gets too large."""
        self._least_nbytes += sum(len(leaf.path) + _LEAST_OF_REGION for leaf in leaves)
        refuse_too_large(self._facts, [*self._files.values()], self._least_nbytes)

    def write_leaves(self, leaves: Iterable[Leaf]) -> None:
        """Write the bytes of all leaves, each into the safetensors file that it names.

        When it returns, the bytes are durable. One call writes a file whole.

        Raises:
            CaptureError: A leaf's path, name, type, shape or length is impossible.
            SaveError: The storage fails or is full.
        """
        with self._attempt() as folder:
            plans = plan_files(leaves)
            check_new_names((plan.name for plan in plans), self._files)
            self._count(leaf for plan in plans for leaf in plan.leaves)
            self._check_paths((leaf.path, leaf.offsets) for plan in plans for leaf in plan.leaves)
            for plan in plans:
                linked = self._linked(folder, plan)
                self._files[plan.name] = linked or write_plan(self._storage, folder, plan)

    def _linked(self, folder: str, plan: FilePlan) -> FileEntry | None:
        if self._like is None or plan.name not in self._constant:
            return None
        return link_plan(self._storage, folder, plan, self._like)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file that is not tensors; when it returns, its bytes are durable.

        Args:
            name: Letters, digits, ".", "_" and "-", the first not "." or "-".
            data: The whole content.

        Raises:
            CaptureError: The name is impossible or taken.
            SaveError: The storage fails or is full.
        """
        with self._attempt() as folder:
            check_new_names([name], self._files)
            self._files[name] = write_plain(self._storage, folder, name, data)

    @property
    def staging(self) -> str:
        """The folder that other ranks store their files in, with `store_leaves`."""
        return self._folder or ""

    def adopt(self, files: Iterable[FileEntry]) -> None:
        """Add files to the checkpoint that other ranks stored, durably, in its folder.

        Args:
            files: What their `store_leaves` returned.

        Raises:
            CaptureError: A name or a tensor is there already.
            SaveError: A file is not there, or not as long: others see another folder.
        """
        with self._attempt() as folder:
            for file in files:
                self._check_is_there(folder, file)
                check_new_names([file.name], self._files)
                self._check_paths(
                    (region.path, region.offsets)
                    for region in file.regions
                    if region.path is not None
                )
                self._files[file.name] = file

    def _check_is_there(self, folder: str, file: FileEntry) -> None:
        found = self._storage.stat(f"{folder}/{file.name}")
        if found is None or found.nbytes != file.nbytes:
            where = self._storage.describe(f"{folder}/{file.name}")
            expected, nbytes = f"{file.nbytes} bytes", None if found is None else found.nbytes
            what = "is not as another rank has stored it"
            hint = "all ranks must see the same run directory"
            raise SaveError(where, what, expected=expected, found=nbytes or "no file", hint=hint)

    def commit(self, facts: Mapping[str, Json]) -> Manifest:
        """Make it a checkpoint. When it returns, the checkpoint survives a power cut.

        If an intact checkpoint of this step with the same state and facts is there, it is kept.

        Args:
            facts: What `unbroken show` and later tools may want to know without reading a file.

        Returns:
            The manifest of the checkpoint.

        Raises:
            CaptureError: The facts are not JSON, or the manifest is larger than any reader takes.
            LockHeldError: This process does not own the run directory any more.
            SaveError: The storage fails or is full; nothing was committed.
        """
        with self._attempt() as folder:
            manifest = self._manifest(facts)
            committed = commit_staging(self._storage, folder, manifest, self._require_ownership)
        self._is_over = True
        return committed

    def abandon(self) -> None:
        """Abandon the save and remove its files as far as possible. Never raises `OSError`."""
        folder, self._folder, self._is_over = self._folder, None, True
        if folder is not None:
            with suppress(OSError):  # the next start sweeps what is left
                remove_staging(self._storage, folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        if not self._is_over:
            self.abandon()

    def _make_staging(self) -> str:
        ensure_folder(self._storage, STAGING)
        folder = free_name(self._storage, STAGING, checkpoint_name(self._step))
        self._storage.make_folder(folder)
        return folder

    def _manifest(self, facts: Mapping[str, Json]) -> Manifest:
        plain = from_strict(to_canonical(facts, "facts"))
        if not isinstance(plain, dict):
            raise CaptureError("facts", "must be a mapping", found=type(facts).__name__)
        created = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        files = tuple(self._files[name] for name in sorted(self._files))
        manifest = Manifest(self._step, self._run_id, created, files, plain)
        try:
            manifest.tensors  # noqa: B018 (raises where shards do not make up their tensor)
        except MalformedError as error:
            raise CaptureError("the checkpoint", error.what, found=error.found) from None
        refuse_too_large(plain, files, len(manifest.to_bytes()))
        return manifest

    def _check_paths(self, paths: Iterable[tuple[str, tuple[int, ...] | None]]) -> None:
        for path, offsets in paths:
            if (path, offsets) in self._paths:
                raise CaptureError(path, "two leaves have this path")
            self._paths.add((path, offsets))

    @contextmanager
    def _attempt(self) -> Iterator[str]:
        """Yield the staging folder; any error abandons the save."""
        if self._is_over:
            where = self._storage.describe(checkpoint_name(self._step))
            raise SaveError(where, "this attempt is over", hint="make a new CheckpointWriter")
        try:
            yield self._folder or ""
        except LockHeldError:  # an OSError, but not of the storage
            self.abandon()
            raise
        except OSError as error:
            self.abandon()
            where = self._storage.describe(checkpoint_name(self._step))
            raise save_error(error, where) from error
        except BaseException:
            self.abandon()
            raise
