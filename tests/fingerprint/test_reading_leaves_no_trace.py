"""Records are read in a forked child: files, generators, terminals and locks stay as they were."""

from __future__ import annotations

import os
import struct
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

from unbroken.fingerprint import NOT_COMPARED, begin_data_facts, data_facts
from unbroken.fingerprint.dataset import ForkedWork


class Data(Dataset):
    """Numbers; `each` is called before each is read."""

    def __init__(self, each: Any = lambda index: None) -> None:
        self.each = each

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        self.each(index)
        return torch.tensor(float(index))


def unread(data: Any) -> str:
    """Return why the records of a data set are not compared."""
    records = data_facts(data)["records"]
    assert isinstance(records, str)
    assert records.startswith(NOT_COMPARED)
    return records.removeprefix(NOT_COMPARED)


class Reader:
    """Opens its file when first read, deep inside a data set."""

    def __init__(self, path: Any) -> None:
        self.path, self.file = path, None

    def __call__(self, index: int) -> bytes:
        if self.file is None:
            self.file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (stays open)
        self.file.seek(index * 8)
        return self.file.read(8)


@pytest.fixture
def numbers(tmp_path):
    path = tmp_path / "numbers.bin"
    path.write_bytes(b"".join(struct.pack("q", i) for i in range(64)))
    return path


def test_a_file_opened_lazily_by_a_nested_object_stays_closed(numbers):
    data = Data(Reader(numbers))
    assert len(data_facts(data)["records"]) >= 1
    assert data.each.file is None


def test_an_open_file_keeps_its_position(numbers):
    reader = Reader(numbers)
    reader(3)
    assert "records" in data_facts(Data(reader))
    with reader.file as file:
        assert file.tell() == 32


def test_an_inherited_file_is_read_from_where_it_stood(numbers):
    with open(numbers, "rb", buffering=0) as file:
        file.seek(16)
        text = ForkedWork(lambda write: write(file.read(8).hex()), seconds=5).output().lines
        assert text == [struct.pack("q", 2).hex()]
        assert file.tell() == 16


def test_nothing_is_said_and_no_file_is_written(capfd, tmp_path):
    with open(tmp_path / "log", "w") as log:
        log.write("begun;")

        def shout(index: int) -> None:
            print("heard", flush=True)
            os.write(2, b"heard")
            log.write("heard")
            log.flush()

        assert "records" in data_facts(Data(shout))
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "log").read_text() == "begun;"


def test_a_pipe_of_the_parent_is_out_of_reach():
    here, there = os.pipe()
    data_facts(Data(lambda index: os.write(there, b"x")))
    os.close(there)
    assert os.read(here, 1) == b""
    os.close(here)


def test_a_data_set_that_hangs_is_given_up_and_reaped():
    lock = threading.Lock()
    with lock:
        begun = time.monotonic()
        assert unread(Data(lambda index: lock.acquire())) == "it took longer than 3 s"
    assert time.monotonic() - begun < 5
    with suppress(ChildProcessError):  # there is none at all
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)


def test_a_child_that_dies_leaves_no_records():
    assert unread(Data(lambda index: os._exit(3))) == "their reader died"
    assert unread(Data(lambda index: os.kill(os.getpid(), 9))) == "their reader died"


def test_threads_in_the_parent_do_no_harm():
    pool = torch.ones(512, 512) @ torch.ones(512, 512)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    facts = data_facts(Data(lambda index: pool @ pool))
    stop.set()
    thread.join()
    assert len(facts["records"]) >= 1


def test_counters_of_a_data_set_are_not_moved():
    seen: list[int] = []
    data_facts(Data(seen.append))
    assert seen == []


class Raising(Data):
    def __getitem__(self, index: int) -> torch.Tensor:
        if index in (0, 63):
            raise ValueError(index)
        return super().__getitem__(index)


def test_a_record_that_raises_counts_by_its_exception():
    records = data_facts(DataLoader(Raising(), sampler=range(1, 57)), clock=lambda: 0.0)["records"]
    assert (len(records), records[0] == records[1], records[1] == records[2]) == (16, True, False)


def test_a_file_that_cannot_be_read_now_is_no_record():
    data = Data(lambda index: os.stat("/nowhere"))
    assert unread(data) == "reading one raised FileNotFoundError"


def test_records_of_which_not_one_can_be_read_are_not_taken_for_equal():
    assert unread(Data(lambda index: {}["gone"])) == "reading one raised KeyError"


class Batched(Data):
    def __getitem__(self, index: list[int]) -> torch.Tensor:
        assert isinstance(index, list)
        return torch.tensor(index)


def test_a_data_set_of_batches_is_read_by_lists_of_one():
    sampler = BatchSampler(SequentialSampler(range(64)), 8, drop_last=False)
    loader = DataLoader(Batched(), sampler=sampler, batch_size=None)
    assert len({*data_facts(loader, clock=lambda: 0.0)["records"]}) == 16


def test_plain_containers_are_read_without_a_child(monkeypatch):
    monkeypatch.delattr(os, "fork")
    for data in ([1, 2], (1, 2), range(2), torch.ones(2), [{"x": torch.ones(1)}]):
        assert "records" in data_facts(data)


def test_without_a_fork_there_are_no_records(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert unread(Data()) == "there is no process of their own to read them in"


def test_what_the_data_are_is_taken_when_it_is_begun():
    data = Data()
    begun = begin_data_facts(data, clock=lambda: 0.0)
    data.each = lambda index: 1 / 0
    assert begun()["records"] == data_facts(Data(), clock=lambda: 0.0)["records"]


def test_a_child_that_nobody_asks_is_reaped():
    begun = begin_data_facts(Data(lambda index: time.sleep(60)))
    del begun
    with suppress(ChildProcessError):  # there is none at all
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)
