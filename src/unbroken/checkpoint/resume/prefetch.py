"""Reading a checkpoint while the objects that get its tensors are still being made."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Collection, Iterable
from contextlib import suppress

import torch

from unbroken.capture import byte_view
from unbroken.checkpoint.resume.readers import Source
from unbroken.checkpoint.resume.selection import Candidates, Selection
from unbroken.errors import UnbrokenError
from unbroken.storage import Storage
from unbroken.store import Box, Catalog, CheckpointReader, Manifest

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


def read_ahead(
    storage: Storage, selection: Selection, objects: Collection[str]
) -> ReadAhead | None:
    """Begin to read what a resume will choose; None if there is nothing, or it cannot be known.

    Whatever keeps the checkpoint from being opened is told by the resume.

    Args:
        storage: The run directory; another process may hold it, and is not disturbed.
        selection: What the resume will be asked for.
        objects: Names of the objects whose tensors are read.
    """
    with suppress(UnbrokenError, OSError):
        candidates = Candidates(Catalog(storage), storage)
        for candidate in candidates.of(candidates.resolved(selection)):
            if isinstance(candidate, CheckpointReader):
                return ReadAhead(candidate, objects)
    return None


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
