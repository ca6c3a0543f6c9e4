"""Storages that keep long files compressed, and show them as if they were not."""

from __future__ import annotations

import errno
import importlib
import os
import struct
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import xxhash

from unbroken.errors import ConfigError, NewerFormatError
from unbroken.storage.protocol import (
    COMPRESSED,
    Bytes,
    Closing,
    ReadHandle,
    Stat,
    Storage,
    WriteHandle,
)
from unbroken.storage.subfolder import FolderStorage

# Chunks of bytes, made smaller without loss: byte planes, and zstd behind them.
#
# The numbers of one tensor are alike in their highest byte (sign and exponent) and noise in their
# lowest. So all first bytes are packed together, then all second ones, and so on; a plane that does
# not get smaller is kept as it is.


WIDTHS = (1, 2, 4, 8)  # bytes of one number
AS_IT_IS = 0  # instead of a width: a chunk that does not get smaller
_LEVEL = 1  # a higher one looks for repeated text, of which weights have none
_SAMPLE_BYTES = 32 << 10
_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def load_zstd(where: str) -> Any:
    """Return the library of zstd.

    Raises:
        ConfigError: It is not installed; the error names `where`.
    """
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        hint = "pip install 'unbroken[zstd]'"
        raise ConfigError(where, f"compressed files need {_MODULE}", hint=hint) from None


def pack(chunk: bytes, zstd: Any) -> tuple[int, bytes]:
    """Return a chunk made smaller, and the width of its numbers; or `AS_IT_IS` and the chunk.

    Example:
        >>> zstd = load_zstd("here")
        >>> chunk = struct.pack("<1000f", *(number / 7 for number in range(1000)))
        >>> width, packed = pack(chunk, zstd)
        >>> width, len(packed) < 3500, unpack(width, packed, len(chunk), zstd) == chunk
        (4, True, True)
    """

    def packed_planes(data: bytes, width: int) -> list[bytes]:
        planes = [data[start::width] for start in range(width)]
        return [min(plane, zstd.compress(plane, _LEVEL), key=len) for plane in planes]

    start = len(chunk) // 2 & -max(WIDTHS)
    sample = chunk[start : start + _SAMPLE_BYTES]
    doubt = len(sample) >> 9  # more planes must pay: of equal ones, the sample shows little
    width = min(WIDTHS, key=lambda one: sum(map(len, packed_planes(sample, one))) + one * doubt)
    planes = packed_planes(chunk, width)
    packed = struct.pack(f"<{width}I", *map(len, planes)) + b"".join(planes)
    return (width, packed) if len(packed) < len(chunk) else (AS_IT_IS, chunk)


def unpack(width: int, packed: bytes, nbytes: int, zstd: Any) -> bytearray:
    """Return the chunk of `nbytes` bytes that was packed.

    Raises:
        ValueError: These bytes are no such chunk.
    """
    if width == AS_IT_IS:
        planes = [packed]
    else:
        end = 4 * width
        lengths = struct.unpack(f"<{width}I", packed[:end]) if len(packed) >= end else ()
        planes = []
        for number, length in enumerate(lengths):
            plane, end = packed[end : end + length], end + length
            planes.append(_unpack_plane(plane, len(range(number, nbytes, width)), zstd))
    if sum(map(len, planes)) != nbytes:
        raise ValueError(f"expected {nbytes} bytes, found {sum(map(len, planes))}")
    chunk = bytearray(nbytes)
    for start, plane in enumerate(planes):
        chunk[start :: len(planes)] = plane
    return chunk


def _unpack_plane(plane: bytes, nbytes: int, zstd: Any) -> bytes:
    if len(plane) == nbytes:  # it did not get smaller
        return plane
    reader = zstd.ZstdDecompressor()
    try:
        plain: bytes = reader.decompress(plane, nbytes + 1)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from None
    if len(plain) != nbytes or not reader.eof:
        raise ValueError(f"expected a plane of {nbytes} bytes, found {len(plain)}")
    return plain


# One compressed file: chunks, an index of them, and a footer; `docs/format.md` has the layout.


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


class CompressedWriteHandle(Closing):
    """A new file, whose chunks are packed by a few threads while the caller brings more.

    The inner handle is that of the empty file, and is closed with this one; `chunk_bytes` plain
    bytes are packed together, and any read unpacks as many.
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
        offset, nbytes = self._end + len(begin), sum(chunk.nbytes for chunk in self._index)
        index += _TOTALS.pack(offset, len(self._index), nbytes)
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


class CompressedReadHandle(Closing):
    """An open compressed file, read as the plain one that was written.

    The inner handle is closed with this one.

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
    """Return whether a file cannot be read because of what it is, and not of this process."""
    return error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)


def _index_of(file: ReadHandle, where: str) -> list[Chunk]:
    """Return the chunks of a compressed file, in order."""
    footer_at = file.nbytes - _FOOTER_BYTES
    if footer_at < len(MAGIC):
        _fail("the compressed file is cut off", where)
    begin, end = (_read(file, at, len(MAGIC)) for at in (0, file.nbytes - len(MAGIC)))
    if begin == end != MAGIC and begin.startswith(_NAME):
        hint, found = "upgrade unbroken to read it", f"version {begin[-1]}"
        raise NewerFormatError(where, "is compressed in a newer way", found=found, hint=hint)
    if begin != MAGIC or end != MAGIC:
        _fail("the compressed file is cut off or damaged", where)
    footer = _read(file, footer_at, _FOOTER_BYTES)
    totals, rest = footer[: _TOTALS.size], footer[_TOTALS.size :]
    start, count, nbytes = _TOTALS.unpack(totals)
    if start + count * _ENTRY.size != footer_at:
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


_TENSORS = ".safetensors"
_LONG_BYTES = 1 << 20


class PlainView(FolderStorage):
    """Another storage, whose compressed files look like plain ones. It compresses nothing.

    Args:
        inner: The other storage.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> disk = MemoryStorage()
        >>> with CompressedStorage(disk).create("a.safetensors", 4 << 20) as file:
        ...     file.write(bytes(4 << 20))
        >>> disk.list(""), PlainView(disk).list("")
        (['a.safetensors.planes'], ['a.safetensors'])
        >>> PlainView(disk).stat("a.safetensors").nbytes
        4194304
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, "")

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file that did not exist, as the other storage does."""
        self._refuse_taken(path + COMPRESSED, path)
        return self._inner.create(path, nbytes)

    def open(self, path: str) -> ReadHandle:
        """Open a file for reading; of a compressed one, the plain bytes."""
        name = self._kept(path)
        file = self._inner.open(name)
        if name == path:
            return file
        try:
            return CompressedReadHandle(file, self.describe(name))
        except BaseException:
            file.close()
            raise

    def append(self, path: str, data: bytes) -> None:
        """Write `data` at the end of a file; a compressed one is refused (`EOPNOTSUPP`)."""
        self._refuse_compressed(path)
        self._inner.append(path, data)

    def truncate(self, path: str, nbytes: int) -> None:
        """Cut a file to its first `nbytes` bytes; a compressed one is refused (`EOPNOTSUPP`)."""
        self._refuse_compressed(path)
        self._inner.truncate(path, nbytes)

    def sync_file(self, path: str) -> None:
        """Make the bytes of a file durable."""
        self._inner.sync_file(self._kept(path))

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder in one atomic step, replacing nothing."""
        self._inner.rename(*self._names(source, target))

    def link(self, source: str, target: str) -> None:
        """Give a file a second name."""
        self._inner.link(*self._names(source, target))

    def remove_file(self, path: str) -> None:
        """Remove the name of a file."""
        self._inner.remove_file(self._kept(path))

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder."""
        return sorted(name.removesuffix(COMPRESSED) for name in self._inner.list(path))

    def stat(self, path: str) -> Stat | None:
        """Return what is known of a file; the length of a compressed one is that of its content.

        A compressed file that is cut off or damaged has the length that it has on the disk.
        """
        name = self._kept(path)
        found = self._inner.stat(name)
        if found is None or name == path:
            return found
        try:
            with self.open(path) as file:
                return Stat(file.nbytes, False, found.modified_ns, found.identity)
        except OSError as error:
            if not is_fault_of_the_file(error):
                raise
            return found

    def _kept(self, path: str) -> str:
        """Return the name that a file has in the other storage."""
        if not path or self._inner.stat(path) is not None:
            return path
        return path if self._inner.stat(path + COMPRESSED) is None else path + COMPRESSED

    def _names(self, source: str, target: str) -> tuple[str, str]:
        """Return the names of a file, and of what it is to become, in the other storage."""
        name = self._kept(source)
        if name == source:
            self._refuse_taken(target + COMPRESSED, target)
            return source, target
        self._refuse_taken(target, target)
        return name, target + COMPRESSED

    def _refuse_taken(self, name: str, path: str) -> None:
        if self._inner.stat(name) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.describe(path))

    def _refuse_compressed(self, path: str) -> None:
        if self._kept(path) != path:
            what = "is compressed, and cannot be changed"
            raise OSError(errno.EOPNOTSUPP, what, self.describe(path))


class CompressedStorage(PlainView):
    """Another storage, in which long files are kept compressed, without loss.

    What is read is, byte for byte, what was written; sizes are those of the plain bytes. Files of
    the other storage that are not compressed are read as they are, so that one run may hold both.
    Worth it where the storage is slow or metered: it costs the processor's time.

    Args:
        inner: The other storage.
        suffix: How the names end of files to compress. Others are written as they are.
        least_bytes: So long at least is a file announced that is compressed.

    Raises:
        ConfigError: The library of zstd is not installed.

    Example:
        >>> import tempfile
        >>> from unbroken.storage import LocalStorage
        >>> storage = CompressedStorage(LocalStorage(tempfile.mkdtemp()))
        >>> with storage.create("model.safetensors", 2 << 20) as file:
        ...     file.write(bytes(2 << 20))
        ...     file.sync()
        >>> storage.stat("model.safetensors").nbytes
        2097152
    """

    def __init__(
        self, inner: Storage, *, suffix: str = _TENSORS, least_bytes: int = _LONG_BYTES
    ) -> None:
        super().__init__(inner)
        self._suffix = suffix
        self._least_bytes = least_bytes
        load_zstd(inner.describe())

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file that did not exist; one that is going to be long is compressed."""
        if nbytes < self._least_bytes or not path.endswith(self._suffix):
            return super().create(path, nbytes)
        self._refuse_taken(path, path)
        # Long, but nobody knows how long: room for all of it may not be there, nor be needed.
        file = self._inner.create(path + COMPRESSED, min(nbytes, _LONG_BYTES))
        return CompressedWriteHandle(file, self.describe(path + COMPRESSED))
