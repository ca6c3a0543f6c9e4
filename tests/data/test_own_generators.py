"""Data that draw from a generator of their own, read in this process, go on with their numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from data.data_sets import bytes_of, read
from unbroken.data import batch_source
from unbroken.errors import DataError

N = 20  # five batches of four


class Noisy:
    """Records with noise from a generator in the object."""

    def __init__(self, rng) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), drawn(self.rng)])


def drawn(rng) -> float:
    if isinstance(rng, torch.Generator):
        return torch.rand((), generator=rng).item()
    return float(rng.random())


class Holder:
    def __init__(self, rng) -> None:
        self.rng = rng


class Nested(Noisy):
    """The same, from one that an object of the data set holds."""

    def __init__(self, rng) -> None:
        super().__init__(None)
        self.augment = Holder(rng)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), drawn(self.augment.rng)])


class Replacing(Noisy):
    """Takes another generator at each record."""

    def __getitem__(self, index: int) -> torch.Tensor:
        self.rng = random.Random(self.rng.random())
        return super().__getitem__(index)


class Collator:
    def __init__(self, rng) -> None:
        self.rng = rng

    def __call__(self, samples):
        return torch.tensor(samples) + drawn(self.rng)


def source(make, **more):
    """Return a source of such data, of which nothing else is random."""
    data = make()
    collate = {"collate_fn": data} if isinstance(data, Collator) else {}
    given = [*range(N)] if collate else data
    return batch_source(given, seed=0, global_batch_size=4, **collate, **more)


KINDS = {
    "random.Random": lambda: Noisy(random.Random(1)),
    "torch's Generator": lambda: Noisy(torch.Generator().manual_seed(1)),
    "numpy's Generator": lambda: Noisy(np.random.default_rng(1)),
    "numpy's old one in a new": lambda: Noisy(np.random.Generator(np.random.MT19937(1))),
    "numpy's RandomState": lambda: Noisy(np.random.RandomState(1)),
    "in an object": lambda: Nested(random.Random(1)),
    "one after the other": lambda: Replacing(random.Random(1)),
    "a collator": lambda: Collator(random.Random(1)),
}


@pytest.mark.parametrize("ahead", [0, 1, 3], ids="{} ahead".format)
@pytest.mark.parametrize("used", [3, 8])
@pytest.mark.parametrize("name", KINDS)
def test_they_go_on_with_the_numbers_of_their_position(name, used, ahead):
    whole = bytes_of(read(source(KINDS[name]), used + 4))
    killed, again = source(KINDS[name]), source(KINDS[name])
    batches = killed.iterate()
    for _ in range(used):
        killed.used(next(batches))
    for _ in range(ahead):
        next(batches)  # read, and never used
    again.load_state_dict(killed.state_dict())
    assert whole.endswith(bytes_of(read(again, 4)))


@pytest.mark.parametrize("name", KINDS)
def test_without_their_states_they_go_on_otherwise(name):
    whole = bytes_of(read(source(KINDS[name]), 7))
    killed, again = source(KINDS[name]), source(KINDS[name])
    read(killed, 3)
    state = killed.state_dict()
    state.pop("generators")
    again.load_state_dict(state)
    assert not whole.endswith(bytes_of(read(again, 4)))


def test_what_others_draw_between_two_batches_counts():
    def train(first, last, data):
        found = []
        for batch in data.iterate():
            found.append(batch)
            data.used(batch)
            data.data.rng.random()  # an evaluation, say
            if len(found) == last - first:
                break
        return bytes_of(found)

    make = KINDS["random.Random"]
    whole, killed, again = (source(make) for _ in range(3))
    expected = train(0, 9, whole)
    train(0, 4, killed)
    again.load_state_dict(killed.state_dict())
    assert expected.endswith(train(4, 9, again))


def test_what_others_draw_while_batches_are_read_ahead_is_refused_unless_other_data_are_meant():
    killed, again = source(KINDS["random.Random"]), source(KINDS["random.Random"])
    batches = killed.iterate()
    killed.used(next(batches))
    next(batches)
    killed.data.rng.random()
    with pytest.raises(DataError, match="others drew from them") as caught:
        again.load_state_dict(killed.state_dict())
    assert 'allow=["data"]' in caught.value.hint
    again.accept_other_data()
    again.load_state_dict(killed.state_dict())


def test_what_is_read_again_in_one_process_is_the_same():
    data = source(KINDS["random.Random"])
    batches = data.iterate()
    data.used(next(batches))
    first = bytes_of([next(batches)])
    assert bytes_of([next(data.iterate())]) == first


def test_another_generator_than_there_was_is_refused():
    killed, again = source(KINDS["random.Random"]), source(KINDS["numpy's Generator"])
    read(killed, 3)
    with pytest.raises(DataError, match="do not hold the generators that they held"):
        again.load_state_dict(killed.state_dict())


ODD = [None, [], ["random", 3], ["random", [3, [1, 2], None]], ["torch", b"x"], ["numpy PCG64", {}]]


@pytest.mark.parametrize("state", ODD, ids=str)
def test_a_state_that_is_none_is_an_error_of_ours(state):
    killed, again = source(KINDS["random.Random"]), source(KINDS["random.Random"])
    read(killed, 3)
    odd = killed.state_dict()
    odd["generators"]["states"] = {"data.rng": state}
    with pytest.raises(DataError, match="are no states of generators"):
        again.load_state_dict(odd)


def test_generators_that_nothing_moves_are_not_stored_and_workers_may_read():
    class Still(Noisy):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor([float(index)])

    killed = source(lambda: Still(random.Random(1)))
    read(killed, 3)
    assert "generators" not in killed.state_dict()
    source(lambda: Still(random.Random(1)), num_workers=2).load_state_dict(killed.state_dict())


class Making(Noisy):
    """Makes a generator for each record, and none before."""

    def __init__(self) -> None:
        pass

    def __getitem__(self, index: int) -> torch.Tensor:
        self.rng = random.Random(index)
        return super().__getitem__(index)


def test_generators_that_reading_makes_are_made_again():
    whole = bytes_of(read(source(Making), 7))
    killed, again = source(Making), source(Making)
    read(killed, 3)
    again.load_state_dict(killed.state_dict())
    assert whole.endswith(bytes_of(read(again, 4)))


def test_workers_and_other_ranks_keep_none():
    assert source(KINDS["random.Random"]).own_generators.are_kept
    for more in ({"num_workers": 2}, {"world_size": 2}):
        assert not source(KINDS["random.Random"], **more).own_generators.are_kept
