"""Reading and writing long files past the page cache (`O_DIRECT`).

For files of gigabytes that nobody reads again soon, the page cache is the bottleneck: bytes are
copied into it, it pushes out what other programs keep there, and syncing it is slower than the
device. `docs/design/0015-at-the-speed-of-the-device.md` has the figures.

The kernel takes only addresses, offsets and lengths that are multiples of a block.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from unbroken.storage.protocol import Bytes

BLOCK = 4096  # what every disk of today takes; a smaller one would do on most
_MAX_CALL = 64 << 20  # bytes of one write: a process that is to end waits for it
_WITHOUT_COPY = 1 << 20  # what is shorter is collected
_HUGE = 2 << 20  # bytes of a huge page, or a multiple of it
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS and others have none
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV}


def set_direct(fd: int, enabled: bool) -> bool:
    """Turn the page cache off or on for a descriptor; return whether it is off now."""
    if not _DIRECT:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _DIRECT if enabled else flags & ~_DIRECT)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return enabled


def aligned_buffer(nbytes: int, *, inherited: bool = True) -> memoryview:
    """Return zeroed memory for what goes to a device, or comes from it.

    It starts at a multiple of a page, and is made of huge pages where the system has them: then
    the kernel has five times less to do for a direct write.

    Args:
        nbytes: Its length; what nobody touches costs nothing.
        inherited: Whether forked processes get it too. They would share its pages, and each page
            that is written then is copied first.
    """
    memory = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for name, enabled in (("MADV_HUGEPAGE", True), ("MADV_DONTFORK", not inherited)):
        if enabled and hasattr(mmap, name):
            with contextlib.suppress(OSError):  # a system without them
                memory.madvise(getattr(mmap, name))
    whole = memoryview(memory)
    return whole[-_address(whole) % _HUGE :][:nbytes]


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy bytes; other threads of Python go on meanwhile."""
    if source.readonly or len(source) < BLOCK:
        target[:] = source
    else:
        ctypes.memmove(_address(target), _address(source), len(source))


def _address(data: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


def reserve(fd: int, nbytes: int) -> None:
    """Ask for room for a file at once; where that is not known, nothing happens.

    Raises:
        OSError: There is not enough of it.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise


class LongWrite:
    """Write a new file of known length past the page cache, from a few buffers in turn.

    While the device takes some, the caller fills the next. Memory that is aligned as its
    offset in the file is goes to the device without a copy. On a file system that refuses, the
    same bytes go through its cache.

    Args:
        fd: A descriptor of the empty file, open for writing.
        nbytes: How long it is going to be.
        buffers: Aligned buffers of equal length, at least two.
    """

    def __init__(self, fd: int, nbytes: int, buffers: list[memoryview]) -> None:
        self._fd = fd
        self._buffers = deque(buffers)  # the first is being filled, the last are being written
        self._start = 0  # of the current buffer, in the file
        self._filled = 0
        self._size = nbytes
        self._is_direct = set_direct(fd, True)
        self._writer = ThreadPoolExecutor(1, "unbroken-write")
        self._running: deque[Future[None]] = deque()
        reserve(fd, nbytes)

    def write(self, data: Bytes) -> None:
        """Take all of `data`; what the device says of it may come with a later call."""
        rest = memoryview(data).cast("B")
        while len(rest) > 0:
            straight = self._length_without_copy(rest)
            if straight > 0:
                self._put(rest[:straight], self._start)
                self._start += straight
                rest = rest[straight:]
                continue
            count = min(len(rest), self._room(rest), len(self._current) - self._filled)
            copy_bytes(self._current[self._filled : self._filled + count], rest[:count])
            self._filled += count
            rest = rest[count:]
            if self._filled == len(self._current):
                self._turn()

    def finish(self) -> None:
        """Write what is left, and give the file its length; more may follow."""
        self._wait()
        whole = self._filled // BLOCK * BLOCK
        rest = self._filled - whole
        end = whole + (BLOCK if rest else 0)
        self._current[self._filled : end] = bytes(end - self._filled)
        self._put(self._current[:end], self._start)
        self._current[:rest] = bytes(self._current[whole : whole + rest])
        self._start, self._filled = self._start + whole, rest
        length = self._start + rest
        if length != self._size or end != whole + rest:
            os.ftruncate(self._fd, length)
            self._size = length

    def close(self) -> list[memoryview]:
        """Stop, without writing what is left; return the buffers."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        return list(self._buffers)

    @property
    def _current(self) -> memoryview:
        return self._buffers[0]

    def _room(self, rest: memoryview) -> int:
        """Return how much to copy: to the end of the block if what follows needs no copy."""
        missing = -self._filled % BLOCK
        if missing and len(rest) > _WITHOUT_COPY and _is_aligned(rest[missing:]):
            return missing
        return len(self._current) - self._filled

    def _length_without_copy(self, rest: memoryview) -> int:
        """Return how many bytes can go from the caller's memory to the device."""
        if len(rest) < _WITHOUT_COPY or self._filled % BLOCK or not _is_aligned(rest):
            return 0
        if self._filled:
            self._turn(self._filled)
        return len(rest) // BLOCK * BLOCK

    def _turn(self, filled: int | None = None) -> None:
        """Hand the current buffer to the device, and go on with the next."""
        filled = len(self._current) if filled is None else filled
        full = self._current[:filled]
        try:
            self._running.append(self._writer.submit(self._put, full, self._start))
        except RuntimeError:  # the interpreter is being shut down, and starts no work elsewhere
            self._put(full, self._start)
        self._buffers.rotate(-1)
        self._start, self._filled = self._start + filled, 0
        if len(self._running) == len(self._buffers):
            self._running.popleft().result()

    def _wait(self) -> None:
        while self._running:
            self._running.popleft().result()

    def _put(self, data: memoryview, offset: int) -> None:
        while len(data) > 0:
            try:
                written = os.pwrite(self._fd, data[:_MAX_CALL], offset)
            except OSError as error:
                if not (self._is_direct and error.errno in _REFUSED):
                    raise
                self._is_direct = set_direct(self._fd, False)
                continue
            data, offset = data[written:], offset + written
            if written % BLOCK and self._is_direct:
                self._is_direct = set_direct(self._fd, False)


def _is_aligned(data: memoryview) -> bool:
    """Return whether memory starts at a block; of read-only memory nobody knows."""
    if data.readonly or not data.contiguous or len(data) == 0:
        return False
    return _address(data) % BLOCK == 0


class LongRead:
    """Read a file past the page cache, unless it is in it already.

    Args:
        fd: A descriptor, open for reading.
        nbytes: The length of the file.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self._is_direct = not is_cached(fd, nbytes) and set_direct(fd, True)

    def fill(self, offset: int, target: memoryview, buffer: memoryview) -> int:
        """Fill `target`, through `buffer`; return how many bytes are left for the usual way."""
        while len(target) > 0 and self._is_direct:
            skip = offset % BLOCK
            length = min(len(buffer), -(-(skip + len(target)) // BLOCK) * BLOCK)
            try:
                count = os.preadv(self._fd, [buffer[:length]], offset - skip) - skip
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                count = 0
            if count <= 0:  # refused, or the file has become shorter: the usual way says which
                self._is_direct = set_direct(self._fd, False)
                break
            count = min(count, len(target))
            copy_bytes(target[:count], buffer[skip : skip + count])
            target, offset = target[count:], offset + count
        return len(target)


def is_cached(fd: int, nbytes: int, samples: int = 16) -> bool:
    """Return whether most of a file seems to be in the page cache: reading it again costs no disk.

    Asks `mincore` about a few pages, which reads none of them. Where nobody knows: yes.
    """
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None or nbytes == 0:
        return True
    hits = 0
    for number in range(samples):
        page = nbytes * number // samples // mmap.ALLOCATIONGRANULARITY
        try:
            hits += _is_resident(mincore, fd, page * mmap.ALLOCATIONGRANULARITY)
        except (OSError, ValueError):  # it cannot be mapped, or is shorter than it was
            return True
    return hits * 4 >= samples * 3


def _is_resident(mincore: Callable[..., int], fd: int, offset: int) -> bool:
    with mmap.mmap(fd, 1, access=mmap.ACCESS_COPY, offset=offset) as page:
        here, found = ctypes.c_char.from_buffer(page), ctypes.create_string_buffer(1)
        failed = mincore(ctypes.c_void_p(ctypes.addressof(here)), ctypes.c_size_t(1), found)
        del here  # a mapping that is looked at cannot be closed
    return failed != 0 or bool(found.raw[0] & 1)
