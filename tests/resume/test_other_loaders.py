"""Loaders that are not ours resume exactly too: by their own state, or by counting and skipping."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from scenarios import outcome, run_fresh
from small_trainers import PAIRS, small_trainer
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


LOADERS = {
    "a shuffling DataLoader": lambda: shuffled(0),
    "a shuffling DataLoader with workers": lambda: shuffled(2),
    "an iterable data set": Stream,
    "a loader of an iterable data set": lambda: DataLoader(Stream(), batch_size=4),
    "a loader with a state": Stateful,
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
