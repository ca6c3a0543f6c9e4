"""Loaders that are not ours resume exactly too: by their own state, or by counting and skipping."""

from __future__ import annotations

import importlib
import os
import random
import signal
import warnings
from importlib.util import find_spec

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, WeightedRandomSampler

from fresh import run_fresh
from scenarios import outcome
from small_trainers import PAIRS, bits, small_trainer
from unbroken.errors import DataError
from unbroken.training import Callback


class Stream(IterableDataset):
    """Samples with noise from the global generators; nothing to save."""

    def __iter__(self):
        for x, y in PAIRS:
            yield x + torch.randn(6) * 0.1 + random.random(), y


class Stateful:
    """Batches from a place of its own, which it can tell and take back."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self):
        while self.next < len(PAIRS) // 4:
            batch = PAIRS[self.next * 4 : self.next * 4 + 4]
            self.next += 1
            yield torch.stack([x for x, _ in batch]), torch.stack([y for _, y in batch])
        self.next = 0

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = state["next"]


def shuffled(workers: int) -> DataLoader:
    context = "fork" if workers else None
    return DataLoader(
        PAIRS, batch_size=4, shuffle=True, num_workers=workers, multiprocessing_context=context
    )


def of_torchdata() -> DataLoader:
    """A loader with a state, of which the order of its sampler is no part."""
    warnings.filterwarnings("ignore", ".*set_vital.*")
    kind = importlib.import_module("torchdata.stateful_dataloader").StatefulDataLoader
    sampler = WeightedRandomSampler(torch.arange(1.0, 41.0), 40)
    return kind(PAIRS, batch_size=4, sampler=sampler)


LOADERS = {
    "a shuffling DataLoader": lambda: shuffled(0),
    "a shuffling DataLoader with workers": lambda: shuffled(2),
    "an iterable data set": Stream,
    "a loader of an iterable data set": lambda: DataLoader(Stream(), batch_size=4),
    "a loader with a state": Stateful,
    **({} if find_spec("torchdata") is None else {"torchdata's loader": of_torchdata}),
}


class Kill(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_micro_batch_end(self, trainer) -> None:
        if trainer.progress.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: str, name: str, kill_at: int | None, forgetful: bool = False) -> None:
    torch.set_num_threads(1)
    trainer = small_trainer(
        folder,
        dataset=LOADERS[name](),
        batch_size=8,
        micro_batch_size=4,
        max_steps=12,
        save_steps=3,
        log_data_digest=True,
        trainer={"callbacks": [Kill(kill_at)]},
    )
    if forgetful:
        trainer.source.load_state_dict = lambda state: None
    trainer.train()


def killed_and_resumed(folder, name, kill_at, forgetful=False):
    assert run_fresh(run, str(folder), name, kill_at) == -signal.SIGKILL
    assert run_fresh(run, str(folder), name, None, forgetful) == 0
    return outcome(folder, 12)


# An epoch has five steps: the cuts lie in its middle, at its edge, and in the next one.
@pytest.mark.parametrize("kill_at", [0, 4, 5, 7])
@pytest.mark.parametrize("name", LOADERS)
def test_a_run_over_a_foreign_loader_is_the_same_run(name, kill_at, tmp_path):
    assert run_fresh(run, str(tmp_path / "whole"), name, None) == 0
    whole = outcome(tmp_path / "whole", 12)
    assert killed_and_resumed(tmp_path / "cut", name, kill_at) == whole


@pytest.mark.parametrize("name", LOADERS)
def test_a_foreign_loader_that_starts_over_would_be_noticed(name, tmp_path):
    assert run_fresh(run, str(tmp_path / "whole"), name, None) == 0
    whole = outcome(tmp_path / "whole", 12)
    assert killed_and_resumed(tmp_path / "cut", name, 4, forgetful=True) != whole


def test_a_generator_is_refused_because_it_cannot_be_started_again(tmp_path):
    with pytest.raises(DataError, match="cannot be"):
        small_trainer(tmp_path, dataset=(pair for pair in PAIRS))


class OwnOrder(IterableDataset):
    """A stream in the order of a generator in the object."""

    def __init__(self) -> None:
        self.rng = random.Random(3)

    def __iter__(self):
        yield from self.rng.sample(PAIRS, 40)


class CountsPasses(IterableDataset):
    """Another order in each of its own passes."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        yield from random.Random(self.passes).sample(PAIRS, 40)


class LossWeighted(Sampler):
    def __init__(self) -> None:
        self.losses = torch.ones(40)

    def __len__(self) -> int:
        return 40

    def __iter__(self):
        return iter(torch.multinomial(self.losses, 40).tolist())


class Weigh(Callback):
    """Gives the samples other weights after each step, as a loss would."""

    def __init__(self, sampler: LossWeighted) -> None:
        self.sampler = sampler

    def on_step_end(self, trainer) -> None:
        self.sampler.losses[trainer.progress.step] += 0.1


def by_loss(folder, **settings):
    sampler = LossWeighted()
    loader = DataLoader(PAIRS, batch_size=8, sampler=sampler)
    more = {"callbacks": [Weigh(sampler)], "state": {"losses": sampler.losses}}
    return small_trainer(folder, dataset=loader, trainer=more, **settings)


def of_own_order(folder, **settings):
    return small_trainer(folder, dataset=OwnOrder(), **settings)


def by_passes(folder, **settings):
    return small_trainer(folder, dataset=CountsPasses(), **settings)


@pytest.mark.parametrize("step", [2, 5, 7, 11])
@pytest.mark.parametrize("make", [by_passes, by_loss, of_own_order])
def test_data_that_move_what_they_keep_go_on_exactly(make, step, tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    make(tmp_path / "whole", max_steps=14, **constant).train()
    make(tmp_path / "cut", max_steps=step, **constant).train()
    make(tmp_path / "cut", max_steps=14, **constant).train()
    assert outcome(tmp_path / "cut", 14) == outcome(tmp_path / "whole", 14)


@pytest.mark.parametrize(("make", "step"), [(of_own_order, 3), (of_own_order, 7), (by_loss, 5)])
def test_data_that_reading_again_does_bring_back_go_on(make, step, tmp_path):
    constant = {"lr_scheduler_type": "constant"}
    make(tmp_path / "cut", max_steps=step, **constant).train()
    cut, whole = (make(tmp_path / n, max_steps=9, **constant) for n in ("cut", "whole"))
    report = cut.train().resume_report
    whole.train()
    assert (report.step, report.verdict) == (step, "exact")
    assert bits(cut.model) == bits(whole.model)
