"""The device's own speed, and what the page cache holds."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

CHUNK = 16 << 20


def bare_write(path: Path, nbytes: int) -> float:
    """Return the seconds of a direct write and fsync of so many bytes: the device's speed."""
    data = memoryview(mmap.mmap(-1, CHUNK))
    data[:] = os.urandom(CHUNK)
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(fd, 0, nbytes)
    for start in range(0, nbytes // 4096 * 4096, CHUNK):
        os.pwrite(fd, data[: min(CHUNK, nbytes // 4096 * 4096 - start)], start)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def bare_read(place: Path) -> float:
    """Return the seconds of a direct read of a file, or of all large files of a folder."""
    data = memoryview(mmap.mmap(-1, CHUNK))
    began = time.perf_counter()
    for path in files_of(place):
        if path.stat().st_size > 1 << 20:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            start = 0
            while count := os.preadv(fd, [data], start):
                start += count
            os.close(fd)
    return time.perf_counter() - began


def make_cold(place: Path) -> None:
    """Drop files from the page cache."""
    for path in files_of(place):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def make_hot(place: Path) -> None:
    """Bring files into the page cache."""
    for path in files_of(place):
        path.read_bytes()


def files_of(place: Path) -> list[Path]:
    return [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
