"""Loaders that know their place: it is trusted where it holds the order, and verified."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from data.data_sets import NoisyDataset, NoisyStream, StatefulLoader, bytes_of, read, source_of
from unbroken.data import CountedSource, StatefulSource
from unbroken.errors import DataError

torchdata = pytest.importorskip("torchdata.stateful_dataloader")

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*")


class Numbers(NoisyDataset):
    deterministic = True

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, 0], dtype=torch.float64)


NUMBERS, WEIGHTS = Numbers(22), torch.arange(1.0, 23.0)


class Shuffling(Sampler):
    """An order from one of the global generators."""

    def __init__(self, shuffle) -> None:
        self.shuffle = shuffle

    def __len__(self) -> int:
        return 22

    def __iter__(self):
        self.shuffle(order := [*range(22)])
        return iter(order)


class Rest(Shuffling):
    """One that knows its order and its place in it."""

    def __init__(self) -> None:
        super().__init__(random.shuffle)
        self.rest: list[int] = []

    def __iter__(self):
        self.rest = self.rest or [*super().__iter__()]
        while self.rest:
            yield self.rest.pop()

    def state_dict(self):
        return {"rest": list(self.rest)}

    def load_state_dict(self, state):
        self.rest = list(state["rest"])


def noisy_collate(samples):
    return torch.stack(samples) + torch.rand(())


def by(make_sampler, dataset=NUMBERS, **options):
    return lambda workers: torchdata.StatefulDataLoader(
        dataset, batch_size=4, sampler=make_sampler(), num_workers=workers, **options
    )


def plain(dataset=NUMBERS, **options):
    return lambda workers: torchdata.StatefulDataLoader(
        dataset, batch_size=4, num_workers=workers, **options
    )


def in_batches(make_sampler):
    return lambda workers: torchdata.StatefulDataLoader(
        NUMBERS, batch_sampler=BatchSampler(make_sampler(), 4, False), num_workers=workers
    )


READ_AGAIN = {
    "weighted": by(lambda: WeightedRandomSampler(WEIGHTS, 22)),
    "of a subset": by(lambda: SubsetRandomSampler(range(20))),
    "random": by(lambda: RandomSampler(NUMBERS)),
    "batches of a random one": in_batches(lambda: RandomSampler(NUMBERS)),
    "by Python's random": by(lambda: Shuffling(random.shuffle)),
    "by numpy.random": by(lambda: Shuffling(np.random.shuffle)),
    "batches of one by Python's random": in_batches(lambda: Shuffling(random.shuffle)),
    "a stream without a place": plain(NoisyStream(22)),
}
ONLY_IN_WORKERS = {
    "a random collator": plain(shuffle=True, collate_fn=noisy_collate),
    "random samples": plain(NoisyDataset(22), shuffle=True),
}
TRUSTED = {
    "shuffle": plain(shuffle=True),
    "in order": plain(),
    "with its own generator": by(lambda: RandomSampler(NUMBERS, generator=torch.Generator())),
    "weighted, with its own generator": by(
        lambda: WeightedRandomSampler(WEIGHTS, 22, generator=torch.Generator())
    ),
    "of ranks": by(lambda: DistributedSampler(NUMBERS, 1, 0)),
    "a sampler with a state": by(Rest),
    "snapshots now and then": plain(shuffle=True, snapshot_every_n_steps=3),
}


@pytest.fixture
def differing_generators():
    """Called before each start: the ambient generators stand elsewhere each time."""
    return lambda start: (torch.manual_seed(start), random.seed(start), np.random.seed(start))


def cut(make, used: int, disturb) -> bytes:
    disturb(used + 1)
    first, again = source_of(make()), source_of(make())
    head = read(first, used)
    disturb(used + 2)
    again.load_state_dict(first.state_dict())
    return bytes_of(head) + bytes_of(read(again, 14 - used))


ALL = {**READ_AGAIN, **TRUSTED, **ONLY_IN_WORKERS}
WITH_WORKERS = ("weighted", "by Python's random", "shuffle", *ONLY_IN_WORKERS)


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in ALL), *((name, 2) for name in WITH_WORKERS)]
)
def test_a_loader_with_a_state_goes_on_with_the_same_data(name, workers, differing_generators):
    make = partial(ALL[name], workers)
    whole = bytes_of(read(source_of(make()), 14))
    for used in (4, 8) if workers else (1, 4, 8):  # an epoch has five or six batches
        assert cut(make, used, differing_generators) == whole


def test_its_own_state_is_used_only_where_it_holds_the_order():
    assert {type(source_of(make(0))) for make in READ_AGAIN.values()} == {CountedSource}
    assert {type(source_of(make(0))) for make in TRUSTED.values()} == {StatefulSource}
    assert {type(source_of(make(2))) for make in ONLY_IN_WORKERS.values()} == {CountedSource}


def test_the_loader_alone_goes_on_with_other_data():
    """The negative control: why an order without a state is read again."""
    loaders = [READ_AGAIN["weighted"](0) for _ in range(2)]
    torch.manual_seed(1)
    batches = iter(loaders[0])
    next(batches)
    loaders[1].load_state_dict(loaders[0].state_dict())
    assert not torch.equal(torch.cat([*batches]), torch.cat([*loaders[1]]))


class Forgetful(StatefulLoader):
    """Its state leaves out the noise, which it draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__(22, 4)
        self.rng = random.Random(3)

    def __iter__(self):
        for batch in super().__iter__():
            yield batch + self.rng.random()


class OneTooFar(StatefulLoader):
    def load_state_dict(self, state):
        self.given = state["given"] + self.size if state["given"] else 0


class PlaceOfAStream(IterableDataset):
    """Each pass in an order of its own, of which the state knows only the place."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self):
        for number in torch.randperm(22).tolist()[self.given :]:
            self.given += 1
            yield torch.tensor([float(number)])
        self.given = 0

    state_dict, load_state_dict = StatefulLoader.state_dict, StatefulLoader.load_state_dict


WRONG_STATES = {
    "a generator that it forgets": Forgetful,
    "one batch too far": lambda: OneTooFar(22, 4),
    "an order that it draws anew": PlaceOfAStream,
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_state_that_leads_to_another_batch_is_refused_by_both_digests(name):
    first, again = source_of(WRONG_STATES[name]()), source_of(WRONG_STATES[name]())
    read(first, 3)
    again.load_state_dict(first.state_dict())
    what = (
        r"item (2|11) of epoch 0, from its own state: .*expected digest \w{16}, found digest \w{16}"
    )
    with pytest.raises(DataError, match=what) as caught:
        next(again.iterate())
    assert "whose epoch is read again" in caught.value.hint
