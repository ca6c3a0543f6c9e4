"""How a checkpoint is read: by each rank, by rank 0 for all of them, or ahead of its load."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import astuple
from typing import Any, Literal, Protocol

import torch

from unbroken.capture import byte_view
from unbroken.distributed import ByteStream, Group
from unbroken.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    RankError,
    UnbrokenError,
)
from unbroken.storage import MemoryStorage, Storage, storage_at
from unbroken.store import (
    CheckpointReader,
    Json,
    Manifest,
    Rejection,
    RunDirectory,
    split_verification,
    this_machine,
)
from unbroken.store.format.canonical_json import digest_of
from unbroken.store.format.manifest import Box

# A checkpoint that rank 0 alone can see, passed on to all ranks tensor by tensor.


class UnseenStorage(MemoryStorage):
    """A directory that this process cannot see: only its name is known.

    Example:
        >>> UnseenStorage("/data/run").describe("checkpoint-10")
        '/data/run/checkpoint-10'
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def describe(self, path: str = "") -> str:
        """Return how the process that sees it calls a path."""
        return os.path.join(self._path, path) if path else self._path


class BroadcastCheckpoint(ABC):
    """A checkpoint of which all ranks read the same things in the same order.

    A part of a tensor is cut out of the whole one, which every rank gets.
    """

    manifest: Manifest

    def read_box_into(
        self, path: str, offsets: tuple[int, ...], shape: tuple[int, ...], buffer: memoryview, /
    ) -> None:
        """Fill `buffer` with a part of a tensor."""
        tensor = self.manifest.tensors[path]
        whole = memoryview(bytearray(tensor.nbytes))
        self.read_leaf_into(path, whole)
        tensor.cut_out(Box(offsets, shape), whole, _flat(buffer))

    @abstractmethod
    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        """Fill `buffer` with the verified bytes of a tensor."""


class BroadcastSender(BroadcastCheckpoint):
    """The checkpoint as rank 0 has it: what it reads for itself goes to the others as well.

    All ranks make the same calls. Damage that is found here is raised on all of them.

    """

    def __init__(self, reader: CheckpointReader, group: Group, stream: ByteStream) -> None:
        self.storage, self.folder = reader.storage, reader.folder
        self.manifest, self.step = reader.manifest, reader.step
        self._reader = reader
        self._group = group
        self._stream = stream

    def read_file(self, name: str) -> bytes:
        """Return a whole, verified file."""
        return bytes(self._sent(name, lambda: memoryview(bytearray(self._reader.read_file(name)))))

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        """Fill `buffer` with the verified bytes of a tensor."""

        def read() -> memoryview:
            self._reader.read_leaf_into(path, buffer)
            return _flat(buffer)

        self._sent(path, read)

    def check_rest(self) -> None:
        """Verify what was not read yet."""

        def check() -> memoryview:
            self._reader.check_rest()
            return memoryview(b"")

        self._sent("the rest", check)

    def _sent(self, what: str, read: Callable[[], memoryview]) -> memoryview:
        try:
            view = read()
        except CorruptCheckpointError as damage:
            self._group.broadcast(f"read {what}", {"damage": str(damage)})
            raise
        self._group.broadcast(f"read {what}", {"digest": digest_of(view)})
        self._stream.transfer(view)
        return view


class BroadcastReceiver(BroadcastCheckpoint):
    """The checkpoint as it comes from rank 0."""

    def __init__(
        self, storage: Storage, folder: str, manifest: Manifest, group: Group, stream: ByteStream
    ) -> None:
        self.storage, self.folder = storage, folder
        self.manifest, self.step = manifest, manifest.step
        self._group = group
        self._stream = stream

    def read_file(self, name: str) -> bytes:
        """Return a whole file, as rank 0 has read it."""
        sizes = {file.name: file.nbytes for file in self.manifest.files}
        if name not in sizes:
            where = f"{self.folder}: {name}"
            raise CheckpointNotFoundError(where, "the checkpoint has no such file")
        data = bytearray(sizes[name])
        self._receive(name, memoryview(data))
        return bytes(data)

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        """Fill `buffer` with the bytes of a tensor, as rank 0 has read them."""
        self._receive(path, _flat(buffer))

    def check_rest(self) -> None:
        """Wait for rank 0 to verify what was not read yet."""
        self._receive("the rest", memoryview(b""))

    def _receive(self, what: str, view: memoryview) -> None:
        said: Any = self._group.broadcast(f"read {what}")
        if "damage" in said:
            raise CorruptCheckpointError("rank 0", said["damage"])
        self._stream.transfer(view)
        found = digest_of(view)
        if found != said["digest"]:
            where = f"rank {self._group.rank}: {what}"
            raise CorruptCheckpointError(
                where,
                "has not arrived as rank 0 sent it",
                expected=f"digest {said['digest']}",
                found=f"digest {found}",
            )


def _flat(buffer: memoryview) -> memoryview:
    return buffer.cast("B") if buffer.nbytes else memoryview(b"")


ReadFrom = Literal["all", "rank0"]
"""Who reads checkpoints: every rank; or rank 0, which sends them to the others."""


class Source(Protocol):
    """A checkpoint that is being loaded."""

    @property
    def storage(self) -> Storage:
        """Where it is."""

    @property
    def folder(self) -> str:
        """Its folder."""

    @property
    def manifest(self) -> Manifest:
        """What it consists of."""

    @property
    def step(self) -> int:
        """How many optimizer steps were completed."""

    def read_file(self, name: str) -> bytes:
        """Return a whole, verified file."""

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        """Fill `buffer` with the bytes of a tensor."""

    def read_box_into(
        self, path: str, offsets: tuple[int, ...], shape: tuple[int, ...], buffer: memoryview, /
    ) -> None:
        """Fill `buffer` with the bytes of a part of a tensor."""

    def check_rest(self) -> None:
        """Verify what was not read yet."""


class Readers(Protocol):
    """How the ranks of a run open and load a checkpoint together."""

    def open(
        self, found: CheckpointReader | Rejection | None, *, whole: bool
    ) -> Source | Rejection | None:
        """Return what rank 0 found, as this rank reads it.

        Args:
            found: What it is; on other ranks this is not looked at.
            whole: Whether all of it will be read, or verified with `check_rest`.
        """

    def load(self, load: Callable[[], None]) -> CorruptCheckpointError | None:
        """Load on every rank; return the damage that was found, of which all are told.

        Raises:
            UnbrokenError: What failed on this rank for another reason.
            RankError: It failed on another one.
        """


class ReadOnEveryRank:
    """Every rank reads all that it needs; the ranks of one machine divide the verification.

    What a rank has not verified itself was verified by a rank on the same machine, in the same
    files: equal in size, time and identity, and read through the same cache of the same kernel. A
    rank that sees other files (another machine, a copy) verifies all that it reads.

    """

    def __init__(self, run: RunDirectory, group: Group) -> None:
        self._run = run
        self._group = group

    def open(
        self, found: CheckpointReader | Rejection | None, *, whole: bool
    ) -> Source | Rejection | None:
        """Return what rank 0 found, as this rank sees it."""
        if self._group.world_size == 1:
            return found
        said = self._group.broadcast("the checkpoint", _described(found))
        if not isinstance(said, dict) or "reason" in said:
            return _rejection(said)
        own, problem = self._seen(found, said)
        view = None if own is None else [digest_of(own.manifest.to_bytes()), _view_of(own)]
        seen: Any = self._group.gather("what each sees of the checkpoint", [problem, view])
        failed = [f"rank {rank}: {one}" for rank, (one, _) in enumerate(seen) if one is not None]
        if own is None or failed:
            return Rejection(said["folder"], said["step"], failed[0])
        self._group.agree(f"the manifest of {said['folder']}", None if view is None else view[0])
        if whole:
            self._divide(own, [one[1] for _, one in seen])
        return own

    def _seen(
        self, found: CheckpointReader | Rejection | None, said: dict[str, Any]
    ) -> tuple[CheckpointReader | None, str | None]:
        """Return rank 0's checkpoint as it is here, or what is wrong with it here."""
        if isinstance(found, CheckpointReader):
            return found, None
        here = self._run.storage
        is_here = said["directory"] == here.describe()
        storage = here if is_here else storage_at(said["directory"], create=False)
        try:
            return CheckpointReader(storage, said["folder"]), None
        except (CheckpointNotFoundError, CorruptCheckpointError) as error:
            return None, str(error)

    def _divide(self, own: CheckpointReader, views: list[str]) -> None:
        rank = self._group.rank
        same = [other for other, view in enumerate(views) if view == views[rank]]
        parts = split_verification(own.manifest, same)
        mine = parts[same.index(rank)]
        own.leave_to_others(frozenset[tuple[str, int]]().union(*parts) - mine)

    def load(self, load: Callable[[], None]) -> CorruptCheckpointError | None:
        """Load on every rank; tell all of the damage that one of them found."""
        error: UnbrokenError | None = None
        try:
            load()
        except UnbrokenError as caught:
            error = caught
        damaged = type(error) is CorruptCheckpointError
        said: Any = None if error is None else [damaged, str(error)]
        ranks: list[Any] = self._group.gather("load", said)
        failed = {rank: one for rank, one in enumerate(ranks) if one is not None}
        if not failed:
            return None
        if isinstance(error, CorruptCheckpointError) and self._group.world_size == 1:
            return error
        rank, (_, text) = next(iter(failed.items()))
        if all(is_damage for is_damage, _ in failed.values()):
            return CorruptCheckpointError(f"rank {rank}", text)
        if error is not None:
            raise error
        raise RankError(f"rank {rank}", f"could not resume: {text}", ranks=tuple(failed))


class ReadOnRank0:
    """Rank 0 reads and verifies; each tensor goes to the others straight into its place.

    The others need not see the run directory. They verify what arrives once more.

    """

    def __init__(self, run: RunDirectory, group: Group) -> None:
        self._run = run
        self._group = group
        self._stream = ByteStream(group)

    def open(
        self, found: CheckpointReader | Rejection | None, *, whole: bool
    ) -> Source | Rejection | None:
        """Return what rank 0 found, as it comes to this rank."""
        group = self._group
        said = group.broadcast("the checkpoint", _described(found))
        if not isinstance(said, dict) or "reason" in said:
            return _rejection(said)
        own = found if isinstance(found, CheckpointReader) else None
        text = group.broadcast("the manifest", None if own is None else _text_of(own))
        if own is not None:
            return BroadcastSender(own, group, self._stream)
        manifest = Manifest.from_bytes(str(text).encode(), said["folder"])
        is_here = said["directory"] == self._run.storage.describe()
        storage = self._run.storage if is_here else UnseenStorage(said["directory"])
        return BroadcastReceiver(storage, said["folder"], manifest, group, self._stream)

    def load(self, load: Callable[[], None]) -> CorruptCheckpointError | None:
        """Load on every rank; damage that rank 0 finds is raised in all of them."""
        try:
            self._group.run_on_all("load", load)
        except CorruptCheckpointError as damage:
            return damage
        return None


def _described(found: CheckpointReader | Rejection | None) -> Json:
    """Return what other ranks must know to see the same."""
    if found is None:
        return None
    if isinstance(found, Rejection):
        return {"folder": found.folder, "step": found.step, "reason": found.reason}
    return {"folder": found.folder, "step": found.step, "directory": found.storage.describe()}


def _text_of(reader: CheckpointReader) -> str:
    return reader.manifest.to_bytes().decode()


def _rejection(said: Any) -> Rejection | None:
    return None if said is None else Rejection(said["folder"], said["step"], said["reason"])


def _view_of(reader: CheckpointReader) -> str:
    """Return what is equal for two readers that read the same files of one machine."""
    look = [None if stat is None else astuple(stat) for stat in reader.look()]
    return digest_of(json.dumps([this_machine(), look]).encode())


# Reading while the objects that get the tensors are still being made.


_WORTH_ADVICE = 1 << 20
_WORTH_GOING_ON = 64 << 20


class ReadAhead:
    """Tensors that are read and verified in the background, each into memory of its own.

    Nobody else sees this memory. When the same checkpoint is loaded after all, a tensor gets it in
    exchange for its own, or a copy of it if others look at that. Of what was not read in the end,
    for whatever reason, all is as if nothing had been read ahead.

    Args:
        reader: The checkpoint that a resume is going to choose, most likely.
        objects: Names of the objects whose tensors are read.
    """

    def __init__(self, reader: CheckpointReader, objects: Collection[str]) -> None:
        self._reader = reader
        self._look = reader.look()
        self._objects = objects
        self._rooms: dict[str, torch.Tensor] = {}
        self._let_go = weakref.finalize(self, _let_go, self._rooms)
        self._let_go.atexit = False
        self._is_dropped = self._is_whole = False
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self._thread.start()

    def of(self, found: Source) -> Source | PartlyRead:
        """Return the source of the leaves of a checkpoint: what was read, if it is the same."""
        own = self._reader
        if self._is_dropped or not isinstance(found, CheckpointReader):
            return found
        here, there = (one.storage.describe(one.folder) for one in (own, found))
        if here != there or own.manifest != found.manifest or self._look != found.look():
            return found
        found.trust(own)
        return PartlyRead(found, self)

    def has_paid(self) -> bool:
        """Return whether enough was read that going on beside the rest of a start is no loss."""
        return self._is_whole or self._reader.nbytes_verified >= _WORTH_GOING_ON

    def wait(self) -> bool:
        """Wait until the reading is over; return whether every byte of it matched."""
        self._thread.join()
        return self._is_whole

    def hand_over(self, path: str, tensor: torch.Tensor) -> bool:
        """Fill a contiguous tensor on the CPU, once; return False if it is to be read."""
        room = self._rooms.get(path) if self.wait() else None
        if room is None or room.nbytes != tensor.nbytes:
            return False
        _let_go({path: self._rooms.pop(path)})
        if _is_alone(tensor):
            with torch.no_grad():
                tensor.set_(room.untyped_storage(), 0, tensor.shape, tensor.stride())
        else:
            byte_view(tensor)[:] = byte_view(room)
        return True

    def drop(self) -> None:
        """Stop reading, and let go of the memory that no tensor has got."""
        self._is_dropped = True
        self._reader.stop()
        self._thread.join()
        self._let_go()

    def _read(self) -> None:
        """Read all; what goes wrong here is met again, and told, by the load."""
        with suppress(UnbrokenError, OSError, RuntimeError):  # torch's lack of memory is the last
            for path, tensor in self._reader.manifest.tensors.items():
                if path.partition(".")[0] in self._objects and tensor.is_whole and tensor.nbytes:
                    self._rooms[path] = _room(tensor.nbytes)
            requested = [(path, None, byte_view(room)) for path, room in self._rooms.items()]
            self._reader.read_boxes_into(requested)
            self._is_whole = True


class PartlyRead:
    """The leaves of a checkpoint, of which some were read ahead."""

    def __init__(self, found: CheckpointReader, ahead: ReadAhead) -> None:
        self._found = found
        self.hand_over = ahead.hand_over

    @property
    def manifest(self) -> Manifest:
        """Lists the leaves."""
        return self._found.manifest

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        """Fill `buffer` with the verified bytes of a leaf."""
        self._found.read_leaf_into(path, buffer)

    def read_box_into(
        self, path: str, offsets: tuple[int, ...], shape: tuple[int, ...], buffer: memoryview, /
    ) -> None:
        """Fill `buffer` with the verified bytes of a part of a leaf."""
        self._found.read_box_into(path, offsets, shape, buffer)

    def read_boxes_into(self, requested: Iterable[tuple[str, Box | None, memoryview]], /) -> None:
        """Fill many buffers, several at once."""
        self._found.read_boxes_into(requested)


def _room(nbytes: int) -> torch.Tensor:
    """Return memory that children of this process do not get.

    A fork (the data set is looked at in one) would write-protect each page of it, and the first
    step would pay a page fault for each.
    """
    room = torch.empty(nbytes, dtype=torch.uint8)
    _advise(room, "MADV_DONTFORK")
    return room


def _let_go(rooms: dict[str, torch.Tensor]) -> None:
    """Let children of this process have the memory again, whatever becomes of it."""
    for room in rooms.values():
        _advise(room, "MADV_DOFORK")
    rooms.clear()


def _advise(room: torch.Tensor, name: str) -> None:
    """Tell Linux about the pages that are a tensor's alone."""
    advice, page = getattr(mmap, name, None), mmap.PAGESIZE
    start = -(-room.data_ptr() // page) * page
    nbytes = (room.data_ptr() + room.nbytes) // page * page - start
    if advice is not None and nbytes >= _WORTH_ADVICE:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), advice)


def _is_alone(tensor: torch.Tensor) -> bool:
    """Tell whether nobody else looks at a tensor's memory: no view, no array, no process."""
    storage = tensor.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)  # noqa: SLF001 (torch has no public name)
    whole = tensor.storage_offset() == 0 and storage.nbytes() == tensor.nbytes
    return users == 2 and whole and not storage.is_shared()  # the tensor, and `storage` here
