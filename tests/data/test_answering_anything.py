"""Objects that have an answer to any name are used for what they really have; none is fooled."""

from __future__ import annotations

import pytest
import torch

from unbroken.capture import capture
from unbroken.data import CountedSource, MapSource, batch_source
from unbroken.errors import CaptureError, DataError
from unbroken.introspection import has


class Answering:
    """Gives a function for every name, as remote proxies and mocks do."""

    def __getattr__(self, name: str):
        return lambda *arguments, **named: None


class Data(Answering):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(2)


class Loader(Answering):
    def __iter__(self):
        return iter([torch.ones(2)] * 4)


class Delegating:
    """Has what another object has, and no more."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


def batches(data, count: int = 8) -> list:
    found = zip(
        range(count), batch_source(data, seed=1, global_batch_size=2).iterate(), strict=False
    )
    return [micro.data.tolist() for _, micro in found]


def test_only_what_is_really_there_counts():
    assert has(Data(), "__len__")
    assert not has(Data(), "state_dict")
    assert has(Delegating([]), "append")
    assert not has(Delegating([]), "state_dict")


def test_a_data_set_is_not_taken_for_one_that_draws_nothing():
    first = batches(Data())
    torch.rand(3)
    assert batches(Data()) == first


def test_a_data_set_has_no_fingerprint_and_reads_sample_by_sample():
    source = batch_source(Data(), seed=1, global_batch_size=2)
    assert isinstance(source, MapSource)
    assert "fingerprint" not in source.state_dict()


def test_a_loader_is_no_map_and_has_no_state():
    assert isinstance(batch_source(Loader(), seed=1, global_batch_size=1), CountedSource)


def test_an_object_in_the_state_of_a_run_has_none():
    with pytest.raises(CaptureError, match="no state to capture"):
        capture({"proxy": Answering()})


class Raising(Data):
    @property
    def fingerprint(self) -> str:
        raise RuntimeError("no hash yet")


class Unsure(Data):
    @property
    def deterministic(self) -> bool:
        raise KeyError("mode")


@pytest.mark.parametrize("data", [Raising(), Unsure()], ids=["fingerprint", "deterministic"])
def test_a_property_that_raises_is_told_with_its_object(data):
    with pytest.raises(DataError, match=r"(Raising\.fingerprint|Unsure\.deterministic): cannot be"):
        batch_source(data, seed=1, global_batch_size=2)
