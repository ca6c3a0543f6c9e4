"""A checkpoint that rank 0 alone can see, passed on to all ranks tensor by tensor."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from unbroken.distributed import ByteStream, Group
from unbroken.errors import CheckpointNotFoundError, CorruptCheckpointError, RunDirectoryError
from unbroken.storage import FolderStorage, MemoryStorage, Storage
from unbroken.store import CheckpointReader, Json, Lineage, Manifest, RunDirectory
from unbroken.store.boxes import Box
from unbroken.store.digest import digest_of
from unbroken.store.identity import RunIdentity


class UnseenStorage(MemoryStorage):
    """A place that this process cannot see: only its name is known.

    Example:
        >>> UnseenStorage("/data/run").describe("checkpoint-10")
        '/data/run/checkpoint-10'
    """

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place

    def describe(self, path: str = "") -> str:
        """Return how the process that sees it calls a path."""
        return os.path.join(self._place, path) if path else self._place


def place_of(run: RunDirectory) -> Json:
    """Return what the other ranks must know of the run directory."""
    parent = None if run.parent is None else run.parent.to_json()
    identity = {"id": run.run_id, "created": run.created, "parent": parent}
    return {"place": run.storage.describe(), **identity}


def open_as_another(said: Any, given: str | Storage, *, unseen: bool) -> RunDirectory:
    """Return the run directory of rank 0 for another rank: to look at, or only by its name.

    Args:
        said: What rank 0 says of it; see `place_of`.
        given: The directory, or the parent of the branch, as this rank was given it.
        unseen: Whether only rank 0 can see it.

    Raises:
        RunDirectoryError: It cannot be seen from here.
    """
    if unseen:
        parent = None if said["parent"] is None else Lineage.from_json(said["parent"])
        identity = RunIdentity(said["id"], said["created"], parent)
        return RunDirectory(UnseenStorage(said["place"]), identity, None)
    try:
        return RunDirectory.open_readonly(_seen_from_here(said["place"], given))
    except RunDirectoryError as error:
        error.add_note('a folder that only rank 0 sees: load_from="rank0"')
        raise


def _seen_from_here(place: str, given: str | Storage) -> str | Storage:
    """Return rank 0's place in the storage that this rank was given, if that leads there."""
    if isinstance(given, str) or not f"{place}/".startswith(f"{given.describe()}/"):
        return place
    return FolderStorage(given, place[len(given.describe()) + 1 :])


class RelayedCheckpoint(ABC):
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


class SentCheckpoint(RelayedCheckpoint):
    """The checkpoint as rank 0 has it: what it reads for itself goes to the others as well.

    All ranks make the same calls. Damage that is found here is raised on all of them.

    Args:
        reader: Reads it.
        group: The ranks.
        stream: Carries the bytes.
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
            self._group.share(f"read {what}", {"damage": str(damage)})
            raise
        self._group.share(f"read {what}", {"digest": digest_of(view)})
        self._stream.send(view)
        return view


class ReceivedCheckpoint(RelayedCheckpoint):
    """The checkpoint as it comes from rank 0.

    Args:
        storage: Where rank 0 has it.
        folder: Its folder there.
        manifest: What it consists of.
        group: The ranks.
        stream: Carries the bytes.
    """

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
        said: Any = self._group.share(f"read {what}")
        if "damage" in said:
            raise CorruptCheckpointError("rank 0", said["damage"])
        self._stream.send(view)
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
