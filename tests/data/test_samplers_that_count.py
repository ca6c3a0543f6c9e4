"""Samplers and iterables that count their own epochs go on where the killed run was, exactly."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler

from data.data_sets import bytes_of, read
from fresh import run_fresh
from unbroken import Checkpointer
from unbroken.data import batch_source
from unbroken.errors import DataError

N = 12  # three batches of four


class Counting(Sampler):
    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        yield from random.Random(self.epoch).sample(range(N), N)

    def __len__(self) -> int:
        return N


class CountingAtItsEnd(Counting):
    def __iter__(self):
        yield from random.Random(self.epoch).sample(range(N), N)
        self.epoch += 1


class ShufflingOn(Counting):
    """Shuffles one list again and again."""

    def __init__(self) -> None:
        self.order, self.passes = list(range(N)), torch.zeros(1, dtype=torch.int64)

    def __iter__(self):
        self.passes += 1
        random.Random(int(self.passes)).shuffle(self.order)
        return iter(self.order)


class ShufflingAnArray(Counting):
    def __init__(self) -> None:
        self.order = np.arange(N)

    def __iter__(self):
        self.order = self.order[np.random.default_rng(3).permutation(N)]
        return iter(self.order.tolist())


class DrawingOn(Counting):
    """Draws from one generator of its own."""

    def __init__(self) -> None:
        self.rng = random.Random(5)

    def __iter__(self):
        yield from self.rng.sample(range(N), N)


class DrawingOnWithTorch(Counting):
    def __init__(self) -> None:
        self.drawn = torch.Generator().manual_seed(5)

    def __iter__(self):
        yield from torch.randperm(N, generator=self.drawn).tolist()


class CountingStream(IterableDataset):
    def __init__(self) -> None:
        self.inner = Counting()
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        order = random.Random(self.epoch).sample(range(N), N)
        return (torch.tensor([float(index)]) for index in order)


class CountingLoader:
    epoch = 0

    def __iter__(self):
        self.epoch += 1
        order = random.Random(self.epoch).sample(range(N), N)
        return (torch.tensor(order[i : i + 4])[:, None].float() for i in range(0, N, 4))


SAMPLERS = {
    one.__name__: one
    for one in (
        *(Counting, CountingAtItsEnd, ShufflingOn, ShufflingAnArray),
        *(DrawingOn, DrawingOnWithTorch),
    )
}


def loader_of(sampler, workers: int = 0) -> DataLoader:
    records = torch.arange(float(N))[:, None]
    return DataLoader(records, batch_size=4, sampler=sampler, num_workers=workers)


LOADERS = {
    **{name: lambda make=make: loader_of(make()) for name, make in SAMPLERS.items()},
    "CountingStream": lambda: DataLoader(CountingStream(), batch_size=4),
    "CountingLoader": CountingLoader,
}


def source(loader):
    return batch_source(loader, seed=0, global_batch_size=4)


@pytest.mark.parametrize("name", LOADERS)
def test_they_go_on_at_any_batch_of_any_epoch(name):
    whole = bytes_of(read(source(LOADERS[name]()), 12))
    for used in range(11):
        killed, again = source(LOADERS[name]()), source(LOADERS[name]())
        head = read(killed, used)
        again.load_state_dict(killed.state_dict())
        assert bytes_of(head) + bytes_of(read(again, 12 - used)) == whole, used


@pytest.mark.parametrize("name", ["Counting", "DrawingOn"])
def test_worker_processes_change_nothing_of_that(name):
    def made():
        return source(loader_of(SAMPLERS[name](), 2))

    whole = bytes_of(read(made(), 8))
    killed, again = made(), made()
    head = read(killed, 5)
    again.load_state_dict(killed.state_dict())
    assert bytes_of(head) + bytes_of(read(again, 3)) == whole


@pytest.mark.parametrize("name", LOADERS)
def test_a_resume_that_reads_nothing_saves_what_it_was_given(name):
    killed, again, third = (source(LOADERS[name]()) for _ in range(3))
    whole = bytes_of(read(source(LOADERS[name]()), 8))
    head = read(killed, 5)
    again.load_state_dict(killed.state_dict())
    third.load_state_dict(again.state_dict())
    assert bytes_of(head) + bytes_of(read(third, 3)) == whole


def test_without_its_counts_a_later_epoch_is_refused():
    """The negative control."""
    killed, again = source(loader_of(Counting())), source(loader_of(Counting()))
    read(killed, 5)
    state = killed.state_dict()
    state.pop("order")
    again.load_state_dict(state)
    with pytest.raises(DataError, match="is not what the run was trained on"):
        read(again, 1)


def test_samplers_of_torch_store_nothing():
    records = torch.arange(float(N))[:, None]
    data = source(DataLoader(records, batch_size=4, shuffle=True))
    read(data, 5)
    assert "order" not in data.state_dict()


# The same in real processes, in a loop.


def train(folder: str, name: str, workers: int, kill_at: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = loader_of(SAMPLERS[name](), workers) if name in SAMPLERS else LOADERS[name]()
    parts = {"model": model, "optimizer": optimizer}
    run = Checkpointer(folder, data=loader, save_steps=1, **parts)
    with run:
        for _ in run.epochs(4):
            for batch in run.batches():
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if run.step + 1 == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)


def last_weights(folder) -> bytes:
    return (folder / "checkpoint-12" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *(("Counting", 0), ("CountingAtItsEnd", 0), ("DrawingOn", 0)),
        pytest.param("Counting", 2, marks=pytest.mark.sweep),
    ],
)
def test_killed_in_each_epoch_a_loop_ends_with_the_same_bits(name, workers, tmp_path):
    assert run_fresh(train, str(tmp_path / "whole"), name, workers, 0) == 0
    for kill_at in (7, 11) if workers else (2, 6, 7, 11):
        assert run_fresh(train, str(tmp_path / "cut"), name, workers, kill_at) == -signal.SIGKILL
    assert run_fresh(train, str(tmp_path / "cut"), name, workers, 0) == 0
    assert last_weights(tmp_path / "cut") == last_weights(tmp_path / "whole")


def train_on_another_order(folder: str) -> None:
    Counting.__iter__ = lambda self: iter(range(N))
    train(folder, "Counting", 2, 0)


def test_a_refused_order_ends_its_workers_and_the_process(tmp_path):
    """It stood still for ever: workers outlived the error."""
    assert run_fresh(train, str(tmp_path), "Counting", 2, 6) == -signal.SIGKILL
    assert run_fresh(train_on_another_order, str(tmp_path)) == 1
