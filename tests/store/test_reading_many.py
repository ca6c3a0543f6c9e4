"""Many tensors read at once: the same bytes, the same errors, in bounded memory."""

from __future__ import annotations

import contextlib
import os
import threading
import tracemalloc
from dataclasses import dataclass

import pytest

from unbroken.errors import CheckpointNotFoundError, CorruptCheckpointError
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, CheckpointWriter
from unbroken.store.checkpoint.reader import run_in_threads

SIZES = [3 << 20, 5, 0, 2 << 20, (6 << 20) + 7, 1 << 20]


@dataclass(frozen=True)
class Plain:
    path: str
    data: bytes
    file: str = "big.safetensors"
    dtype: str = "U8"
    offsets = None
    global_shape = None
    copied = None

    @property
    def name(self):
        return self.path

    @property
    def shape(self):
        return (len(self.data),)

    @property
    def nbytes(self):
        return len(self.data)

    def chunks(self):
        yield memoryview(self.data)


@pytest.fixture(scope="module")
def leaves():
    return [Plain(f"t{number}", os.urandom(size)) for number, size in enumerate(SIZES)]


@pytest.fixture
def folder(tmp_path, leaves):
    with CheckpointWriter(LocalStorage(tmp_path), step=1, run_id="a" * 32) as writer:
        writer.write_leaves(leaves)
        writer.commit({})
    return tmp_path / "checkpoint-1"


def reader_of(folder):
    return CheckpointReader(LocalStorage(folder.parent), folder.name)


def buffers(leaves):
    return {leaf.path: bytearray(leaf.nbytes) for leaf in leaves}


def damage(folder, *paths):
    """Turn the first byte of tensors over."""
    reader = reader_of(folder)
    with open(folder / "big.safetensors", "r+b") as file:
        for region in reader.manifest.files[0].regions:
            if region.path in paths:
                file.seek(region.offset)
                byte = file.read(1)[0]
                file.seek(region.offset)
                file.write(bytes([byte ^ 1]))


def read_all(reader, targets):
    reader.read_boxes_into([(path, None, memoryview(b)) for path, b in targets.items()])


def fill(folder, targets):
    read_all(reader_of(folder), targets)


def test_all_tensors_come_back(folder, leaves):
    targets = buffers(leaves)
    fill(folder, targets)
    assert targets == {leaf.path: leaf.data for leaf in leaves}


def test_damage_is_told_of_the_first_tensor_in_the_file(folder, leaves):
    damage(folder, "t4", "t3", "t0")
    for _ in range(5):
        with pytest.raises(CorruptCheckpointError, match="t0"):
            fill(folder, buffers(leaves))


def test_all_damage_is_listed_in_the_order_of_the_file(folder):
    damage(folder, "t4", "t0")
    assert [found.path for found in reader_of(folder).verify()] == ["t0", "t4"]


def test_what_was_read_together_need_not_be_checked_again(folder, leaves):
    reader = reader_of(folder)
    read_all(reader, buffers(leaves))
    damage(folder, "t0")
    reader.check_rest()
    with pytest.raises(CorruptCheckpointError):
        reader_of(folder).check_rest()


def test_an_unknown_tensor_is_refused(folder):
    with pytest.raises(CheckpointNotFoundError, match="missing"):
        fill(folder, {"missing": bytearray(1)})


def test_memory_does_not_grow_with_the_checkpoint(folder):
    tracemalloc.start()
    reader_of(folder).check_rest()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 << 20  # of 12 MiB of tensors; four scratch buffers of 2 MiB


def test_each_task_is_done_once_by_several_threads():
    done, meet = [], threading.Barrier(3)

    def work(desk, task):
        if task < 3:
            meet.wait(10)  # three are in work at the same time
        done.append(task)

    run_in_threads(range(50), contextlib.nullcontext, work, 3)
    assert sorted(done) == list(range(50))


def test_the_failure_of_the_first_task_is_raised_and_no_more_is_begun():
    begun = []

    def work(desk, task):
        begun.append(task)
        if task >= 5:
            raise ValueError(task)

    with pytest.raises(ValueError, match="5"):
        run_in_threads(range(1000), contextlib.nullcontext, work, 4)
    assert max(begun) < 10
