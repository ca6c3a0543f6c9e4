"""Long files: past the page cache where the file system allows it, and the same bytes anyway."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest

from unbroken.storage import LocalStorage, direct_io
from unbroken.storage.direct_io import LongRead, aligned_buffer, is_cached

LENGTH = (9 << 20) + 4099
DATA = os.urandom(1 << 20) * 9 + os.urandom(4099)


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


def put(storage, data=DATA, pieces=1 << 20):
    with storage.create("long", len(data)) as file:
        for start in range(0, len(data), pieces):
            file.write(data[start : start + pieces])
        file.sync()


def get(storage, nbytes=LENGTH, start=0):
    buffer = bytearray(nbytes)
    with storage.open("long") as file:
        file.read_into(start, memoryview(buffer))
    return bytes(buffer)


def drop_from_cache(storage):
    fd = os.open(storage.describe("long"), os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def in_cache(storage):
    fd = os.open(storage.describe("long"), os.O_RDONLY)
    try:
        return is_cached(fd, LENGTH)
    finally:
        os.close(fd)


def allows_direct(folder) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture
def on_a_disk(tmp_path):
    if not allows_direct(tmp_path):
        pytest.skip("this file system knows no direct writes")


@pytest.mark.usefixtures("on_a_disk")
def test_a_long_file_leaves_the_page_cache_alone(storage):
    put(storage)
    assert not in_cache(storage)
    assert get(storage) == DATA
    assert not in_cache(storage)


@pytest.mark.usefixtures("on_a_disk")
def test_a_file_that_is_in_the_page_cache_is_known(storage):
    put(storage)
    with open(storage.describe("long"), "rb") as file:
        file.read()
    assert in_cache(storage)
    fd = os.open(storage.describe("long"), os.O_RDONLY)
    left = LongRead(fd, LENGTH).fill(0, memoryview(bytearray(100)), aligned_buffer(8192))
    os.close(fd)
    assert left == 100  # to be read in the usual way, which is faster
    assert get(storage) == DATA


@pytest.mark.parametrize("pieces", [4096, 70_001, 4 << 20, LENGTH])
def test_pieces_of_any_size_make_the_same_file(storage, pieces):
    put(storage, DATA, pieces)
    assert get(storage) == DATA
    assert os.path.getsize(storage.describe("long")) == LENGTH


@pytest.mark.parametrize("skew", [0, 64, 4095])
def test_memory_of_any_alignment_is_written(storage, skew):
    memory = aligned_buffer((10 << 20) + 4096)[skew : skew + LENGTH]
    memory[:] = DATA
    with storage.create("long", 64 + LENGTH) as file:
        file.write(DATA[:64])
        file.write(memory)
        file.sync()
    assert get(storage, 64 + LENGTH) == DATA[:64] + DATA


@pytest.mark.parametrize(("start", "nbytes"), [(0, 1), (4095, 2), (5000, 5 << 20), (LENGTH - 7, 7)])
def test_any_part_is_read_past_the_cache(storage, start, nbytes):
    put(storage)
    drop_from_cache(storage)
    assert get(storage, nbytes, start) == DATA[start : start + nbytes]


def test_memory_as_a_file_system_does(tmp_path):
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no file system in memory here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        storage = LocalStorage(folder)
        put(storage)
        assert get(storage) == DATA


def refusing(call):
    """Return the call of a file system that takes no direct access, and says so only now."""

    def refused(fd, data, *rest):
        if direct_io.fcntl.fcntl(fd, direct_io.fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(fd, data, *rest)

    return refused


def test_a_file_system_that_refuses_late_gets_the_same_bytes(storage, monkeypatch):
    monkeypatch.setattr(direct_io.os, "pwrite", refusing(os.pwrite))
    monkeypatch.setattr(direct_io.os, "preadv", refusing(os.preadv))
    put(storage)
    drop_from_cache(storage)
    assert get(storage) == DATA


def test_short_direct_writes_are_completed(storage, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(direct_io.os, "pwrite", lambda fd, data, at: real(fd, data[:8192], at))
    put(storage, DATA[: 3 << 20])
    assert get(storage, 3 << 20) == DATA[: 3 << 20]


def failing(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_a_write_that_failed_in_the_background_is_told_and_stays_failed(storage, monkeypatch):
    file = storage.create("long", LENGTH)
    monkeypatch.setattr(direct_io.os, "pwrite", failing)
    with pytest.raises(OSError, match=r"Input/output.*long"):
        file.write(DATA * 3)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(OSError, match=r"earlier write or fsync.*long"):
            file.sync()
    file.close()


def test_closing_tells_of_a_failure_that_nobody_heard_of(storage, monkeypatch):
    file = storage.create("long", LENGTH)
    file.write(DATA[: 2 << 20])
    monkeypatch.setattr(direct_io.os, "pwrite", failing)
    with pytest.raises(OSError, match="Input/output"):
        file.close()
    file.close()


def test_a_full_disk_is_told_before_the_first_byte(storage, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space.*long"):
        storage.create("long", LENGTH)


def test_a_file_that_became_shorter_is_no_file_of_zeros(storage):
    put(storage)
    drop_from_cache(storage)
    with storage.open("long") as file:
        os.truncate(storage.describe("long"), 5 << 20)
        with pytest.raises(EOFError):
            file.read_into(0, memoryview(bytearray(LENGTH)))
