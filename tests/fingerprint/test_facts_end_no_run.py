"""Whatever objects of users do when they are asked, taking facts raises nothing, and is quick."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import pathlib
import threading
import time
import uuid
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from unbroken.fingerprint import (
    callable_facts,
    data_facts,
    facts_of,
    model_facts,
    plain_items,
    record_digest,
)


class Data(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


class Delegating(Data):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Answering(Data):
    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class Unpickled(Data):
    def __getstate__(self) -> Any:
        raise RuntimeError

    def __reduce__(self) -> Any:
        raise AttributeError

    def __copy__(self) -> Any:
        raise NotImplementedError


class Raising(Data):
    @property
    def transform(self) -> Any:
        raise RuntimeError

    fingerprint = tokenizer = transform


class Cyclic(Data):
    def __init__(self) -> None:
        self.other = self


class Slots:
    __slots__ = ("x",)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


class Locked(Data):
    def __init__(self) -> None:
        self.lock, self.thread = threading.Lock(), threading.Thread(target=print)


DATA = [Delegating(Data()), Answering(), Unpickled(), Raising(), Cyclic(), Slots(), Locked()]


@pytest.mark.parametrize("data", DATA, ids=lambda data: type(data).__name__)
def test_records_are_read_of(data):
    assert len(data_facts(data, clock=lambda: 0.0)["records"]) == 4


class Endless(Data):
    def __len__(self) -> int:
        raise TypeError


def test_a_length_that_raises_is_left_out():
    assert "length" not in data_facts(Endless())


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    n: int = 3
    lock: Any = dataclasses.field(default_factory=threading.Lock)


def cycle() -> list:
    found: list = []
    found.append({"self": found, "again": found})
    return found


ZOO = {
    "e": Color.RED, "np": np.float32(0.1), "time": np.datetime64("2020-01-01"), "nan": float("nan"),
    "complex": 1j, "class": Config, "big": 1 << 80, "huge": -(1 << 20_000), "text": "\ud800",
    "meta": torch.empty((), device="meta"), "bytes": b"x", "config": Config(), "cycle": cycle(),
    "path": pathlib.Path("/tmp"), "lock": threading.Lock(), "objects": np.array([object()]),
}  # fmt: skip


@pytest.mark.parametrize("value", ZOO.values(), ids=ZOO)
def test_an_attribute_of_a_model_may_be(value):
    model = nn.Sequential(Held(value))
    assert model_facts(model) == model_facts(model)
    assert isinstance(plain_items({"value": value}), dict)


class Held(nn.Module):
    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Any) -> Any:
        return x


class Private(Held):
    config = property(lambda self: 1 / 0)

    def extra_repr(self) -> str:
        return self.nothing


def test_a_model_whose_config_and_print_raise_has_facts():
    assert model_facts(Private())["layer"] == {"(model)": "Private()"}


def test_a_config_that_holds_a_lock_counts_by_the_rest():
    model = Held()
    model.config = Config()
    assert model_facts(model)["n"] == 3


class Wrapping:
    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, x: Any) -> Any:
        return x


def test_a_loss_that_answers_everything_with_itself_ends():
    assert callable_facts(Wrapping())["name"] == "Wrapping"


def test_a_list_of_millions_takes_no_time():
    values, begun = list(range(3_000_000)), time.process_time()
    assert facts_of(values) is not ...
    assert plain_items({"values": values}) == {}
    assert time.process_time() - begun < 0.2


PASSING = [
    time.time(), time.time_ns(), uuid.uuid4().hex, str(uuid.uuid4()), "runs/a", "/tmp/x",
    "2026-01-31 10:00", "20260131_101500", "x" * 100, "cuda:0", torch.device("cpu"),
    pathlib.Path("a"), object(),
]  # fmt: skip


@pytest.mark.parametrize("value", PASSING, ids=[str(place) for place in range(len(PASSING))])
def test_what_is_another_at_each_start_is_left_out(value):
    assert facts_of(value) is ...


@pytest.mark.parametrize("value", [0.1, 3, True, None, "mean", "gelu_new", 1e9, 2**40])
def test_settings_stand_for_themselves(value):
    assert facts_of(value) == value


def test_where_a_model_came_from_is_left_out_everywhere():
    model = Held(argparse.Namespace(name_or_path="a", dtype="b"))
    model.gradient_checkpointing, model.name_or_path, model.k = True, "a", 1
    assert {"k"} == {*model_facts(model)} & {"k", "gradient_checkpointing", "name_or_path"}


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({"[PAD]": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]")
    rules = Tokenizer(words)
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="[PAD]", unk_token="[UNK]")


class Collator:
    def __init__(self, own: Any) -> None:
        self.tokenizer = own

    def __call__(self, samples: Any) -> Any:
        return samples


def test_how_a_tokenizer_was_used_last_does_not_count_and_its_sides_do():
    used, left, new = tokenizer(), tokenizer(), tokenizer()
    used("a a a", truncation=True, max_length=2, padding="max_length")
    left.padding_side = "left"
    facts = [data_facts([1], Collator(one)) for one in (used, new, left)]
    assert facts[0] == facts[1] != facts[2]


def test_addresses_and_sets_in_a_print_do_not_count():
    class Printing(nn.Module):
        def extra_repr(self) -> str:
            return f"{object()}, {{'b', 'a'}}"

    assert model_facts(Printing())["layer"]["(model)"].endswith("{'a', 'b'})")


def test_ranks_of_a_sampler_do_not_count():
    loaders = [
        torch.utils.data.DataLoader(
            [1, 2, 3, 4],
            sampler=torch.utils.data.DistributedSampler([1, 2, 3, 4], num_replicas=2, rank=rank),
        )
        for rank in (0, 1)
    ]
    assert data_facts(loaders[0]) == data_facts(loaders[1])


class Proxy(Wrapping):
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def test_an_object_that_answers_anything_is_no_tokenizer_and_counts_by_what_it_holds():
    assert facts_of(Proxy(1.0)) != facts_of(Proxy(2.0))
    assert record_digest(Proxy(1.0)) != record_digest(Proxy(2.0))


def test_a_config_that_raises_is_told_not_to_be_compared():
    assert model_facts(Private())["config"] == "not compared: it raised builtins.ZeroDivisionError"
