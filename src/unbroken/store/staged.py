"""Writing the files of a checkpoint into its staging folder, hashed on the way."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from unbroken.errors import CaptureError, SaveError
from unbroken.storage import Storage, WriteHandle
from unbroken.store.digest import Digester, digest_of
from unbroken.store.layout import is_file_name
from unbroken.store.leaf import Leaf
from unbroken.store.manifest import FileEntry, Region
from unbroken.store.reader import MAX_WHOLE_BYTES, CheckpointReader
from unbroken.store.safetensors import header_of, in_file_order

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PIECE_BYTES = 1 << 20  # hashed and handed on while it is in the processor's cache


@dataclass(frozen=True)
class Plan:
    """A safetensors file before it is written: its header, and its leaves in file order."""

    name: str
    header: bytes
    leaves: Sequence[Leaf]


def plan_files(leaves: Iterable[Leaf]) -> list[Plan]:
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
        plans.append(Plan(name, header_of(ordered), ordered))
    return plans


def places_in_files(leaves: Iterable[Leaf], page: int) -> tuple[dict[str, int], int]:
    """Return places for the bytes of leaves in one memory, and its length, by their paths.

    Each file begins at a multiple of `page`, and its leaves lie as they do in the file.

    Raises:
        CaptureError: A leaf has a name, type, shape or length that no file can hold.
    """
    places, end = {}, 0
    for plan in plan_files(leaves):
        end += len(plan.header)
        for leaf in plan.leaves:
            places[leaf.path] = end
            end += leaf.nbytes
        end += -end % page
    return places, end


def write_plan(storage: Storage, folder: str, plan: Plan) -> FileEntry:
    """Write a safetensors file, durably, and return what the manifest will say of it."""
    nbytes = len(plan.header) + sum(leaf.nbytes for leaf in plan.leaves)
    with storage.create(f"{folder}/{plan.name}", nbytes) as file:
        file.write(plan.header)
        digests = _write_leaves(file, plan.leaves)
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
    storage: Storage, folder: str, plan: Plan, like: CheckpointReader
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


def _is_same(known: FileEntry, plan: Plan) -> bool:
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


def _write_leaves(file: WriteHandle, leaves: Iterable[Leaf]) -> list[str]:
    """Write leaves, and return their digests; copies that adjoin are written at once."""
    digests: list[str] = []
    memory, start, end = memoryview(b""), 0, 0  # copies to be written
    for leaf in leaves:
        copied = leaf.copied
        if copied is None or copied.memory is not memory or copied.start != end:
            file.write(memory[start:end])
            memory, start, end = memoryview(b""), 0, 0
        if copied is None:
            digests.append(_write_leaf(file, leaf))
            continue
        start = start if copied.memory is memory else copied.start
        memory, end = copied.memory, copied.start + leaf.nbytes
        digests.append(copied.digest)
    file.write(memory[start:end])
    return digests


def _write_leaf(file: WriteHandle, leaf: Leaf) -> str:
    digester = Digester()
    written = 0
    for chunk in leaf.chunks():
        for start in range(0, chunk.nbytes, _PIECE_BYTES):
            piece = chunk[start : start + _PIECE_BYTES]
            digester.update(piece)
            file.write(piece)
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
    """Return what a disk says as the error about the save."""
    if isinstance(error, SaveError):
        return error
    saved = "all earlier checkpoints are as they were"
    hint = f"make room, then save again; {saved}" if error.errno in _NO_ROOM else saved
    place = str(error.filename or where)
    failure = SaveError(place, "cannot be written", found=str(error.strerror), hint=hint)
    failure.errno = error.errno
    return failure
