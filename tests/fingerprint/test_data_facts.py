"""Fingerprints of data: a few records tell, and reading them leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from unbroken.fingerprint import data_facts, record_digest


class Files:
    """Opens its file when first read, as many data sets do, and augments."""

    def __init__(self, salt: int = 0) -> None:
        self.file, self.salt, self.own = None, salt, np.random.default_rng(1)

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int):
        self.file = "open"
        noise = torch.rand(2) + random.random() + np.random.rand()
        return {"x": noise + index + self.salt, "name": f"{index}"}


def generators() -> list:
    state = np.random.get_state(legacy=False)
    return [random.getstate(), str(state), torch.get_rng_state().tolist()]


def test_reading_draws_from_no_generator_and_opens_no_file():
    data, before = Files(), generators()
    facts = data_facts(data)
    assert generators() == before
    assert data.file is None
    assert (facts["length"], len(facts["records"]), facts["repeatable"]) == (1000, 16, True)


def test_equal_data_have_equal_facts_and_other_data_others():
    still = lambda: 0.0  # noqa: E731 (time that stands still: all sixteen are read)
    assert data_facts(Files(), clock=still) == data_facts(Files(), clock=still)
    assert data_facts(Files())["records"] != data_facts(Files(salt=1))["records"]


def test_parts_of_data_sets_are_left_alone_too():
    parts = Files(), Files()
    data_facts(Subset(ConcatDataset(parts), range(1500)))
    assert [part.file for part in parts] == [None, None]


def test_slow_data_are_read_for_fifty_milliseconds_at_most():
    times = iter(range(100))
    facts = data_facts(Files(), clock=lambda: next(times) * 0.02)
    assert 1 <= len(facts["records"]) <= 3


class Drawing(Files):
    def __getitem__(self, index: int):
        return self.own.random()


def test_a_generator_of_its_own_is_found_out_and_not_moved():
    data = Drawing()
    assert data_facts(data)["repeatable"] is False
    assert data.own.random() == np.random.default_rng(1).random()


def test_a_fingerprint_given_by_the_user_is_used_instead_of_records():
    data = Files()
    data.fingerprint = "v2"
    assert "records" not in data_facts(data)
    assert data_facts(data)["fingerprint"] == "v2"


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("read")


def test_a_stream_is_not_read():
    assert set(data_facts(Stream())) == {"class", "source"}


def test_of_a_loader_the_data_set_and_the_way_of_making_batches_count():
    facts = data_facts(DataLoader([1, 2, 3], batch_size=2))
    assert facts["length"] == 3
    assert facts["loader"]["batch_size"] == 2


class Collator:
    def __init__(self, vocabulary: dict, share: float = 0.15) -> None:
        self.tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        self.share = share

    def __call__(self, samples):
        return samples


def test_a_tokenizer_and_the_numbers_of_a_collator_count():
    facts = [
        data_facts([1], Collator(*arguments))
        for arguments in [({"a": 0},), ({"a": 0},), ({"a": 0, "b": 1},), ({"a": 0}, 0.3)]
    ]
    assert facts[0] == facts[1]
    assert facts[0]["tokenizer"] != facts[2]["tokenizer"]
    assert facts[0]["collate_fn"] != facts[3]["collate_fn"]


RECORDS = [
    1, 1.0, True, None, "1", b"1", [1], (1,), {"a": 1}, {"b": 1}, np.int64(1), np.ones(1),
    np.ones((1, 1)), torch.ones(1), torch.ones(1, dtype=torch.float64), torch.tensor([-0.0]),
    torch.tensor([0.0]), torch.tensor(float("nan")), torch.ones(1, dtype=torch.bfloat16),
]  # fmt: skip


def test_records_of_other_types_values_or_shapes_have_other_digests():
    assert len({record_digest(record) for record in RECORDS}) == len(RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=repr)
def test_a_digest_of_a_record_is_the_same_twice(record):
    assert record_digest(record) == record_digest(record)
