"""A journal holds whole records, whatever was torn off its end."""

from __future__ import annotations

import errno
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbroken.errors import CaptureError, RunDirectoryError, SaveError
from unbroken.storage import MemoryStorage
from unbroken.store import Journal
from unbroken.testing import FaultyStorage, PowerCut

RECORDS = [{"step": step, "loss": step / 7, "text": "é\n" * step} for step in range(5)]


def journal_of(records, storage=None) -> Journal:
    journal = Journal(storage or MemoryStorage(), "metrics.jsonl")
    for record in records:
        journal.append(record)
    return journal


def raw(storage) -> bytes:
    with storage.open("metrics.jsonl") as file:
        buffer = bytearray(file.nbytes)
        file.read_into(0, memoryview(buffer))
    return bytes(buffer)


def test_records_come_back_in_order():
    assert list(journal_of(RECORDS).records()) == RECORDS


def test_a_journal_that_is_not_there_is_empty():
    journal = Journal(MemoryStorage(), "metrics.jsonl")
    assert (list(journal.records()), journal.nbytes) == ([], 0)
    journal.sync()
    journal.cut(0)


def test_each_line_is_json_for_any_reader():
    storage = MemoryStorage()
    journal_of(RECORDS, storage)
    assert [json.loads(line) for line in raw(storage).splitlines()] == RECORDS


def test_numbers_that_json_does_not_have_are_spelled_out():
    journal = journal_of([{"loss": float("nan"), "norms": [float("inf"), -float("inf")]}])
    assert list(journal.records()) == [{"loss": "NaN", "norms": ["Infinity", "-Infinity"]}]


def test_what_json_would_bend_is_refused():
    with pytest.raises(CaptureError, match=r"metrics\.jsonl\.shape"):
        journal_of([{"shape": {1: 2}}])


@given(st.integers(0, 400), st.binary(max_size=20).filter(lambda tail: b"\n" not in tail))
def test_any_torn_end_leaves_the_whole_records_before_it(length, garbage):
    storage = MemoryStorage()
    journal_of(RECORDS, storage)
    whole = raw(storage)[:length]
    storage.truncate("metrics.jsonl", len(whole))
    storage.append("metrics.jsonl", garbage)
    kept = RECORDS[: whole.count(b"\n")]
    assert list(Journal(storage, "metrics.jsonl").records()) == kept
    assert list(journal_of([{"next": 1}], storage).records()) == [*kept, {"next": 1}]


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\0\0\n", b"{}x\n\0\n", b"[1]\n"])
def test_lines_at_the_end_that_are_no_records_are_torn_too(tail):
    storage = MemoryStorage()
    nbytes = journal_of(RECORDS, storage).nbytes
    storage.append("metrics.jsonl", tail)
    journal = Journal(storage, "metrics.jsonl")
    assert (list(journal.records()), journal.nbytes) == (RECORDS, nbytes)


def test_a_damaged_line_before_whole_ones_is_an_error():
    storage = MemoryStorage()
    journal_of(RECORDS[:1], storage)
    storage.append("metrics.jsonl", b'{"step":\0\n')
    storage.append("metrics.jsonl", b'{"step":2}\n')
    with pytest.raises(RunDirectoryError, match="the line that ends at byte"):
        list(Journal(storage, "metrics.jsonl").records())


def test_reading_changes_nothing():
    storage = MemoryStorage()
    journal_of(RECORDS, storage)
    storage.append("metrics.jsonl", b'{"torn')
    before = raw(storage)
    list(Journal(storage, "metrics.jsonl").records())
    assert raw(storage) == before


def test_a_cut_forgets_what_came_after():
    journal = journal_of(RECORDS[:2])
    nbytes = journal.nbytes
    for record in RECORDS[2:]:
        journal.append(record)
    journal.cut(nbytes)
    journal.append({"again": True})
    assert list(journal.records()) == [*RECORDS[:2], {"again": True}]


@pytest.mark.parametrize("offset", [-10_000, -1, 1, 10_000])
def test_a_cut_inside_a_record_or_past_the_end_is_refused(offset):
    journal = journal_of(RECORDS)
    nbytes = journal.nbytes
    with pytest.raises(RunDirectoryError, match="cannot be cut"):
        journal.cut(nbytes + offset)
    assert journal.nbytes == nbytes


@pytest.mark.parametrize("mode", ["forget", "names", "zeros"])
def test_a_cut_survives_a_power_cut(mode):
    storage = FaultyStorage()
    journal = journal_of(RECORDS, storage)
    journal.sync()
    journal.cut(0)
    assert list(Journal(storage.after_power_cut(mode), "metrics.jsonl").records()) == []


@pytest.mark.parametrize("mode", ["forget", "names", "zeros", "some"])
def test_synced_records_survive_a_power_cut_whatever_comes_later(mode):
    storage = FaultyStorage()
    journal = journal_of(RECORDS, storage)
    journal.sync()
    journal.append({"later": 1})
    after = list(Journal(storage.after_power_cut(mode), "metrics.jsonl").records())
    assert after in (RECORDS, [*RECORDS, {"later": 1}])


def test_records_that_were_not_synced_may_be_lost():
    storage = FaultyStorage()
    journal_of(RECORDS, storage)
    assert list(Journal(storage.after_power_cut("forget"), "metrics.jsonl").records()) == []


def test_a_kill_in_the_middle_of_an_append_leaves_no_half_record():
    storage = FaultyStorage(cut_at=3)
    with pytest.raises(PowerCut):
        journal_of(RECORDS, storage)
    after = storage.after_kill()
    assert not raw(after).endswith(b"\n")
    assert list(journal_of([{"next": 1}], after).records()) == [*RECORDS[:2], {"next": 1}]


def test_an_append_to_a_full_disk_is_a_save_error_and_leaves_no_half_record():
    storage = FaultyStorage(fail_at=3, error=errno.ENOSPC)
    journal = Journal(storage, "metrics.jsonl")
    for record in RECORDS[:2]:
        journal.append(record)
    with pytest.raises(SaveError, match=r"metrics\.jsonl: cannot be written: found No space"):
        journal.append(RECORDS[2])
    journal.append({"after": 1})
    assert list(journal.records()) == [*RECORDS[:2], {"after": 1}]
    assert raw(storage).endswith(b'{"after":1}\n')


def test_long_journals_are_read_in_pieces():
    records = [{"text": "x" * 1000, "number": number} for number in range(2500)]
    assert list(journal_of(records).records()) == records


@given(st.lists(st.integers(0, 200_000), max_size=4), st.binary(max_size=100))
def test_the_end_is_found_from_the_tail_alone_however_long_the_lines(lengths, torn):
    storage = MemoryStorage()
    whole = journal_of([{"text": "x" * length} for length in lengths], storage).nbytes
    storage.append("metrics.jsonl", torn.replace(b"{", b"["))  # a list is no record
    assert Journal(storage, "metrics.jsonl").nbytes == whole


def test_what_follows_a_damaged_line_is_cut_together_with_it():
    storage = MemoryStorage()
    journal_of(RECORDS[:3], storage)
    storage.append("metrics.jsonl", b'{"step":\0\n')
    storage.append("metrics.jsonl", b'{"step":4}\n')
    journal = Journal(storage, "metrics.jsonl")
    journal.cut(journal.end_before(lambda record: record["step"] > 3))
    assert list(journal.records()) == RECORDS[:3]


def test_a_journal_is_cut_at_the_end_of_a_record_and_nowhere_else():
    journal = journal_of(RECORDS)
    ends = [journal_of(RECORDS[:count]).nbytes for count in range(len(RECORDS) + 1)]
    for nbytes in set(range(journal.nbytes + 2)) - set(ends):
        with pytest.raises(RunDirectoryError, match="cannot be cut"):
            journal.cut(nbytes)
    journal.cut(ends[2])
    assert list(journal.records()) == RECORDS[:2]
