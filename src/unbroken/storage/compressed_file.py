"""One compressed file: chunks, an index of them, and a footer; `docs/format.md` has the layout."""

from __future__ import annotations

import errno
import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from types import TracebackType
from typing import NamedTuple, NoReturn, Self

import xxhash

from unbroken.errors import NewerFormatError
from unbroken.storage.interface import Bytes, ReadHandle, WriteHandle
from unbroken.storage.planes import WIDTHS, load_zstd, pack, unpack

_NAME, _VERSION = b"\x89unbroken zstd\n", b"\x01"
MAGIC = _NAME + _VERSION
_MAX_CHUNK_BYTES = 64 << 20  # of plain bytes, that a reader takes
_ENTRY = struct.Struct("<QIIIQ")
_TOTALS = struct.Struct("<QQQ")  # where the index is, how many chunks, how many plain bytes
_CHECKSUM = struct.Struct("<Q")
_FOOTER_BYTES = _TOTALS.size + _CHECKSUM.size + len(MAGIC)
_THREADS = 4


class Chunk(NamedTuple):
    """Where a chunk stands in the file, as the index has it."""

    offset: int
    stored: int  # bytes in the file
    nbytes: int  # plain bytes
    width: int
    checksum: int  # of the stored bytes


class _Handle:
    """A handle that is closed when its `with` block is left."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self.close()


class CompressedWriteHandle(_Handle):
    """A new file, whose chunks are packed by a few threads while the caller brings more.

    Args:
        inner: The empty file; closed with this handle.
        where: What messages call it.
        chunk_bytes: How many plain bytes are packed together; any read unpacks as many.
    """

    def __init__(self, inner: WriteHandle, where: str, chunk_bytes: int = 1 << 20) -> None:
        self._inner = inner
        self._where = where
        self._zstd = load_zstd(where)
        self._chunk_bytes = chunk_bytes
        self._threads = ThreadPoolExecutor(_THREADS, "unbroken-compress")
        self._chunk = bytearray()
        self._running: deque[tuple[int, Future[tuple[int, bytes]]]] = deque()
        self._index: list[Chunk] = []
        self._end = 0  # of the file, so far
        self._is_whole = self._has_failed = self._is_closed = False

    def write(self, data: Bytes, /) -> None:
        """Take all of `data`; what the storage says of it may come with a later call."""
        rest = memoryview(data).cast("B")
        with self._remembering():
            while len(rest) > 0:
                room = self._chunk_bytes - len(self._chunk)
                self._chunk += rest[:room]
                rest = rest[room:]
                if len(self._chunk) == self._chunk_bytes:
                    self._pack_chunk()

    def sync(self) -> None:
        """Make every byte written so far durable; after any failure, fail for ever."""
        with self._remembering():
            self._finish()
            self._inner.sync()

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self._is_closed:
            return
        try:
            if not self._has_failed:
                with self._remembering():
                    self._finish()
        finally:
            self._is_closed = True
            self._threads.shutdown(cancel_futures=True)
            self._inner.close()

    def _pack_chunk(self) -> None:
        chunk, self._chunk, self._is_whole = bytes(self._chunk), bytearray(), False
        self._running.append((len(chunk), self._threads.submit(pack, chunk, self._zstd)))
        if len(self._running) > _THREADS:
            self._put_chunk()

    def _put_chunk(self) -> None:
        nbytes, packing = self._running.popleft()
        width, packed = packing.result()
        if self._end == 0:
            self._put(MAGIC)
        checksum = xxhash.xxh3_64_intdigest(packed)
        self._index.append(Chunk(self._end, len(packed), nbytes, width, checksum))
        self._put(packed)

    def _finish(self) -> None:
        """Write all chunks and, behind them, the index and the footer; more may follow."""
        if self._chunk:
            self._pack_chunk()
        while self._running:
            self._put_chunk()
        if self._is_whole:
            return
        index = b"".join(_ENTRY.pack(*chunk) for chunk in self._index)
        begin = MAGIC if self._end == 0 else b""
        place, nbytes = self._end + len(begin), sum(chunk.nbytes for chunk in self._index)
        index += _TOTALS.pack(place, len(self._index), nbytes)
        checksum = _CHECKSUM.pack(xxhash.xxh3_64_intdigest(index))
        self._put(begin + index + checksum + MAGIC)
        self._is_whole = True

    def _put(self, data: bytes) -> None:
        self._inner.write(data)
        self._end += len(data)

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Note a failure: what stands in the file behind it means nothing."""
        if self._has_failed or self._is_closed:
            what = "is closed" if self._is_closed else "an earlier write or sync of it failed"
            raise OSError(errno.EBADF if self._is_closed else errno.EIO, what, self._where)
        try:
            yield
        except BaseException:
            self._has_failed = True
            raise


class CompressedReadHandle(_Handle):
    """An open compressed file, read as the plain one that was written.

    Args:
        inner: The file; closed with this handle.
        where: What messages call it.

    Raises:
        NewerFormatError: It is compressed in a way that is newer than this version reads.
        OSError: It is cut off or damaged, or cannot be read.
    """

    def __init__(self, inner: ReadHandle, where: str) -> None:
        self._inner = inner
        self._where = where
        self._chunks = _index_of(inner, where)
        self._starts = [0, *accumulate(chunk.nbytes for chunk in self._chunks)]
        self.nbytes = self._starts[-1]
        self._last: tuple[int, bytearray] = (-1, bytearray())

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill `buffer`; every chunk that it touches is checked before it is unpacked."""
        target = buffer.cast("B")
        if offset + len(target) > self.nbytes:
            raise EOFError(f"{self._where}: ends at byte {self.nbytes}")
        while len(target) > 0:
            number = bisect_right(self._starts, offset) - 1
            skip = offset - self._starts[number]
            with memoryview(self._unpacked(number)) as chunk:
                part = chunk[skip : skip + len(target)]
                target[: len(part)] = part
                offset, target = offset + len(part), target[len(part) :]

    def close(self) -> None:
        """Close the file."""
        self._inner.close()

    def _unpacked(self, number: int) -> bytearray:
        last, plain = self._last
        if last == number:
            return plain
        chunk = self._chunks[number]
        packed = _read(self._inner, chunk.offset, chunk.stored)
        what = f"chunk {number} of the compressed file is damaged"
        if xxhash.xxh3_64_intdigest(packed) != chunk.checksum:
            _fail(what, self._where)
        zstd = load_zstd(self._where)
        try:
            plain = unpack(chunk.width, packed, chunk.nbytes, zstd)
        except ValueError as error:
            _fail(f"{what}: {error}", self._where)
        self._last = (number, plain)
        return plain


def is_fault_of_the_file(error: OSError) -> bool:
    """Tell whether a file cannot be read because of what it is, and not of this process."""
    return error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)


def _index_of(file: ReadHandle, where: str) -> list[Chunk]:
    """Return the chunks of a compressed file, in order."""
    place = file.nbytes - _FOOTER_BYTES
    if place < len(MAGIC):
        _fail("the compressed file is cut off", where)
    begin, end = (_read(file, at, len(MAGIC)) for at in (0, file.nbytes - len(MAGIC)))
    if begin == end != MAGIC and begin.startswith(_NAME):
        hint, found = "upgrade unbroken to read it", f"version {begin[-1]}"
        raise NewerFormatError(where, "is compressed in a newer way", found=found, hint=hint)
    if begin != MAGIC or end != MAGIC:
        _fail("the compressed file is cut off or damaged", where)
    footer = _read(file, place, _FOOTER_BYTES)
    totals, rest = footer[: _TOTALS.size], footer[_TOTALS.size :]
    start, count, nbytes = _TOTALS.unpack(totals)
    if start + count * _ENTRY.size != place:
        _fail("the footer of the compressed file is damaged", where)
    index = _read(file, start, count * _ENTRY.size)
    if _CHECKSUM.pack(xxhash.xxh3_64_intdigest(index + totals)) != rest[: _CHECKSUM.size]:
        _fail("the index of the compressed file is damaged", where)
    chunks = [Chunk._make(entry) for entry in _ENTRY.iter_unpack(index)]
    if sum(chunk.nbytes for chunk in chunks) != nbytes or not all(
        _is_possible(chunk, start) for chunk in chunks
    ):
        _fail("the index of the compressed file is impossible", where)
    return chunks


def _is_possible(chunk: Chunk, end: int) -> bool:
    lies_inside = len(MAGIC) <= chunk.offset <= end - chunk.stored
    return lies_inside and 0 < chunk.nbytes <= _MAX_CHUNK_BYTES and chunk.width in (0, *WIDTHS)


def _read(file: ReadHandle, offset: int, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    file.read_into(offset, memoryview(data))
    return bytes(data)


def _fail(what: str, where: str) -> NoReturn:
    raise OSError(errno.EIO, what, where)
