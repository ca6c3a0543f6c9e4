"""Compressed files: what comes back is what was written, or an error."""

from __future__ import annotations

import os
import random
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from store.plain_unpacker import unpack_file
from unbroken.errors import ConfigError, NewerFormatError
from unbroken.storage import CompressedStorage, LocalStorage, MemoryStorage, local, storage_at
from unbroken.storage.compressed import (
    AS_IT_IS,
    MAGIC,
    CompressedWriteHandle,
    PlainView,
    load_zstd,
    pack,
    unpack,
)
from unbroken.store.format.names import BRANCHES, SET_ASIDE, STAGING, TRASH
from unbroken.testing import FaultyStorage

ZSTD = load_zstd("the tests")
DRAW = random.Random(1)
WEIGHTS = struct.pack("<4096f", *(DRAW.gauss(0, 0.02) for _ in range(4096)))
NAME = "model.safetensors"
KEPT = f"{NAME}.planes"


def put(storage, parts, name=KEPT, *, chunk_bytes=1 << 20):
    with CompressedWriteHandle(storage.create(name), name, chunk_bytes) as file:
        for part in parts:
            file.write(part)
        file.sync()


def get(storage, name=NAME, start=0, stop=None):
    with storage.open(name) as file:
        buffer = bytearray((file.nbytes if stop is None else stop) - start)
        file.read_into(start, memoryview(buffer))
    return bytes(buffer)


def raw(disk) -> bytes:
    return bytes(disk._file(KEPT).data)


# Chunks and planes


@given(st.binary(max_size=300), st.integers(1, 300))
def test_any_chunk_comes_back_from_its_packed_bytes(unit, repeats):
    chunk = unit * repeats
    width, packed = pack(chunk, ZSTD)
    assert unpack(width, packed, len(chunk), ZSTD) == chunk
    assert len(packed) <= len(chunk)


@pytest.mark.parametrize(("letter", "width"), [("B", 1), ("e", 2), ("f", 4), ("d", 8)])
def test_the_width_of_the_numbers_is_found(letter, width):
    draw = random.Random(3)
    values = [draw.choice([1, 2, 7]) if letter == "B" else draw.gauss(0, 1) for _ in range(9999)]
    assert pack(struct.pack(f"<9999{letter}", *values), ZSTD)[0] == width


def test_noise_is_kept_as_it_is():
    noise = os.urandom(5000)
    assert pack(noise, ZSTD) == (AS_IT_IS, noise)


def test_planes_make_weights_smaller_than_zstd_alone_does():
    packed = len(pack(WEIGHTS, ZSTD)[1])
    alone = len(ZSTD.compress(WEIGHTS, 1))
    assert packed < 0.86 * len(WEIGHTS) < 0.92 * len(WEIGHTS) < alone


@pytest.mark.parametrize("wrong", [b"", b"no planes", b"\7\0\0\0" * 4 + b"no zstd" * 4, None])
def test_a_chunk_that_is_none_is_an_error(wrong):
    width, packed = pack(WEIGHTS, ZSTD)
    with pytest.raises(ValueError, match=r"expected|[Dd]ecompress"):
        unpack(width, packed[:-1] if wrong is None else wrong, len(WEIGHTS), ZSTD)


@pytest.mark.parametrize("nbytes", [1000, 1 << 19, (1 << 20) - 4, (1 << 20) + 4, 1 << 21])
def test_a_chunk_that_is_longer_or_shorter_than_it_says_is_an_error(nbytes):
    width, packed = pack(WEIGHTS[:16] * (1 << 16), ZSTD)
    with pytest.raises(ValueError, match="expected"):
        unpack(width, packed, nbytes, ZSTD)


# Files


@given(st.lists(st.binary(max_size=90), max_size=6), st.integers(1, 64), st.data())
def test_any_range_of_any_file_comes_back(parts, chunk_bytes, draw):
    disk, data = MemoryStorage(), b"".join(parts)
    put(disk, parts, chunk_bytes=chunk_bytes)
    start = draw.draw(st.integers(0, len(data)))
    stop = draw.draw(st.integers(start, len(data)))
    assert get(PlainView(disk), start=start, stop=stop) == data[start:stop]
    assert PlainView(disk).stat(NAME).nbytes == len(data)


@pytest.mark.parametrize("chunk_bytes", [1001, 4096, 1 << 20])
def test_a_reader_written_from_the_document_alone_agrees(chunk_bytes):
    disk, data = MemoryStorage(), WEIGHTS + random.Random(4).randbytes(999) + b"text " * 999
    put(disk, [data[:5000], data[5000:]], chunk_bytes=chunk_bytes)
    assert unpack_file(raw(disk)) == data


def test_what_is_written_after_a_sync_is_read_too():
    disk = MemoryStorage()
    with CompressedWriteHandle(disk.create(KEPT), NAME, 256) as file:
        for part in (WEIGHTS, b"and more"):
            file.write(part)
            file.sync()
            assert get(PlainView(disk))[-4:] == part[-4:]
    assert unpack_file(raw(disk)) == WEIGHTS + b"and more"


def test_reading_past_the_end_is_an_error():
    disk = MemoryStorage()
    put(disk, [b"0123456789"], chunk_bytes=4)
    with pytest.raises(EOFError):
        get(PlainView(disk), start=3, stop=11)


@pytest.fixture
def disk():
    """A disk with a file of four chunks, one of them kept as it is."""
    disk = MemoryStorage()
    put(disk, [WEIGHTS[:3072], random.Random(2).randbytes(100)], chunk_bytes=1024)
    assert disk.stat(KEPT).nbytes < 3050  # of 3172 bytes, and 200 to find them
    return disk


def is_refused(disk, intact) -> bool:
    """Whether reading is an error; wrong bytes fail the test."""
    try:
        found = get(PlainView(disk))
    except (OSError, EOFError, NewerFormatError):
        return True
    assert found == intact
    return False


def test_a_flip_of_any_byte_is_an_error_and_never_a_wrong_byte(disk):
    intact, data = get(PlainView(disk)), disk._file(KEPT).data
    for place in range(len(data)):
        data[place] ^= 1 << place % 8
        assert is_refused(disk, intact), place
        data[place] ^= 1 << place % 8
    assert not is_refused(disk, intact)


def test_a_file_cut_off_anywhere_is_an_error(disk):
    intact, whole = get(PlainView(disk)), raw(disk)
    for length in range(len(whole)):
        disk.truncate(KEPT, length)
        assert is_refused(disk, intact), length
        disk._file(KEPT).data[:] = whole


def test_without_checksums_a_flip_would_be_a_wrong_byte(disk):
    """The negative control of the two tests above."""
    intact, data = get(PlainView(disk)), disk._file(KEPT).data
    data[raw(disk).index(intact[-20:])] ^= 1  # noise, kept as it is
    file = PlainView(disk).open(NAME)
    stored = [data[chunk.offset :][: chunk.stored] for chunk in file._chunks]
    checksums = map(xxh3_64_intdigest, stored)
    file._chunks = [c._replace(checksum=x) for c, x in zip(file._chunks, checksums, strict=True)]
    buffer = bytearray(file.nbytes)
    file.read_into(0, memoryview(buffer))
    assert buffer != intact


def test_a_newer_kind_of_compression_is_refused_as_newer(disk):
    data = disk._file(KEPT).data
    data[len(MAGIC) - 1] = data[-1] = 2
    for use in (PlainView(disk).open, PlainView(disk).stat):
        with pytest.raises(NewerFormatError, match="version 2"):
            use(NAME)


# Storages


def test_only_long_files_of_tensors_are_compressed():
    disk = MemoryStorage()
    storage = CompressedStorage(disk)
    sizes = {NAME: 1 << 20, "state.json": 1 << 20, "small.safetensors": (1 << 20) - 1}
    for name, nbytes in sizes.items():
        with storage.create(name, nbytes) as file:
            file.write(bytes(nbytes))
    assert disk.list("") == sorted({*sizes, KEPT} - {NAME})
    assert disk.stat(KEPT).nbytes < 1000
    assert {name: storage.stat(name).nbytes for name in sizes} == sizes


def test_plain_files_are_read_beside_compressed_ones():
    disk = MemoryStorage()
    with disk.create(NAME) as file:
        file.write(WEIGHTS)
    storage = CompressedStorage(disk, least_bytes=1)
    with storage.create(f"new.{NAME}", len(WEIGHTS)) as file:
        file.write(WEIGHTS)
    assert get(storage) == get(storage, f"new.{NAME}") == WEIGHTS


def test_a_compressed_file_is_never_changed_in_place(disk):
    storage, before = PlainView(disk), raw(disk)
    for change in (lambda: storage.append(NAME, b"more"), lambda: storage.truncate(NAME, 1)):
        with pytest.raises(OSError, match="cannot be changed"):
            change()
    assert raw(disk) == before


@pytest.mark.parametrize("is_compressed", [True, False])
@pytest.mark.parametrize("call", ["create", "rename", "link"])
def test_a_name_is_given_once_compressed_or_not(call, is_compressed):
    storage = CompressedStorage(MemoryStorage(), least_bytes=1)
    for name, nbytes in ((NAME, int(is_compressed)), (f"a.{NAME}", int(not is_compressed))):
        with storage.create(name, nbytes) as file:
            file.write(WEIGHTS)
    with pytest.raises(FileExistsError):
        getattr(storage, call)(*([f"a.{NAME}"] if call != "create" else []), NAME)
    assert storage.list("") == [f"a.{NAME}", NAME]


@pytest.mark.parametrize("call", ["rename", "link"])
def test_a_compressed_file_can_be_moved_linked_synced_and_removed(call, disk):
    storage, intact = PlainView(disk), get(PlainView(disk))
    getattr(storage, call)(NAME, "b")
    storage.sync_file("b")
    assert get(storage, "b") == intact
    for name in storage.list(""):
        storage.remove_file(name)
    assert disk.list("") == []


def test_a_damaged_file_has_the_length_it_has_on_the_disk(disk):
    disk.truncate(KEPT, 500)
    assert PlainView(disk).stat(NAME).nbytes == 500


@pytest.mark.parametrize("at", [2, 3, 4, 5])
def test_a_failed_write_fails_every_later_sync(at):
    disk = FaultyStorage(fail_at=at)
    file = CompressedWriteHandle(disk.create(KEPT), NAME, 64)
    with pytest.raises(OSError, match=NAME):
        file.write(WEIGHTS)
    with pytest.raises(OSError, match="an earlier write or sync of it failed"):
        file.sync()
    file.close()
    assert PlainView(disk).stat(NAME).nbytes == disk.stat(KEPT).nbytes


def test_a_closed_file_takes_nothing_more():
    disk = MemoryStorage()
    put(disk, [b"all"])
    file = CompressedWriteHandle(disk.create("other"), "other")
    file.close()
    with pytest.raises(OSError, match="is closed"):
        file.write(b"more")


def test_memory_does_not_grow_with_the_file(tmp_path):
    import tracemalloc

    storage, part = CompressedStorage(LocalStorage(tmp_path)), os.urandom(1 << 20)
    tracemalloc.start()
    with storage.create(NAME, 48 << 20) as file:
        for _ in range(48):
            file.write(part)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


@pytest.fixture
def without_zstd(monkeypatch):
    for name in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)


def test_without_the_library_it_is_said_what_to_install(disk, without_zstd):
    for use in (lambda: CompressedStorage(disk), lambda: get(PlainView(disk))):
        with pytest.raises(ConfigError, match=r"need (backports|compression)\.zstd") as error:
            use()
        assert error.value.hint == "pip install 'unbroken[zstd]'"


def test_without_the_library_plain_files_are_read(without_zstd):
    disk = MemoryStorage()
    disk.append(NAME, WEIGHTS)
    assert get(PlainView(disk)) == WEIGHTS


# What is wrapped


@pytest.mark.parametrize(
    "where",
    [
        "checkpoint-2",
        "copy",
        ".staging/checkpoint-2.1",
        ".trash/checkpoint-2.1",
        "set-aside/checkpoint-2.replaced",
        "branches/again/checkpoint-2",
        "branches/again/branches/more/set-aside/checkpoint-2.1",
    ],
)
def test_a_storage_is_wrapped_only_where_a_file_of_the_run_is_compressed(where, tmp_path):
    folder = tmp_path / where
    folder.mkdir(parents=True)
    (folder / NAME).write_bytes(b"plain")
    assert type(storage_at(tmp_path)) is LocalStorage
    (folder / KEPT).write_bytes(b"packed")
    assert isinstance(storage_at(tmp_path), PlainView)


def test_only_the_folder_that_is_read_is_looked_at(tmp_path):
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-4" / KEPT).write_bytes(b"packed")
    assert type(storage_at(tmp_path, folder="checkpoint-2")) is LocalStorage
    assert isinstance(storage_at(tmp_path, folder="checkpoint-4"), PlainView)


def test_the_folders_in_which_checkpoints_stand_are_those_of_a_run():
    assert set(local._INNER_FOLDERS) == {STAGING, TRASH, SET_ASIDE, BRANCHES}
