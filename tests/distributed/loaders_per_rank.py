"""Runs on several ranks whose loaders are not map-style data sets."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from distributed.training import SAMPLES, Kill, Samples
from unbroken.errors import UnbrokenError
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

STEPS, BATCH = 9, 8
DATA = Samples()


def rank() -> int:
    return int(os.environ["RANK"])


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


class SameStream(IterableDataset):
    """The same samples on all ranks, with noise from a global generator."""

    def __iter__(self):
        for x, y in zip(DATA.x, DATA.y, strict=True):
            yield x + 0.1 * torch.randn(6), y


class OwnStream(IterableDataset):
    """Each rank's own samples: every so manieth, with noise; the last rank has one less."""

    def __iter__(self):
        for place in range(rank(), SAMPLES - 1, world_size()):
            yield DATA.x[place] + 0.1 * torch.randn(6), DATA.y[place]


class Stateful:
    """Each rank's own batches in an order drawn anew in each pass, which is in its state."""

    def __init__(self, micro: int, forgetful: bool = False) -> None:
        self.micro, self.forgetful = micro, forgetful
        self.generator = torch.Generator().manual_seed(rank())
        self.order, self.next = torch.empty(0, dtype=torch.int64), 0

    def __iter__(self):
        if not self.next:
            self.order = torch.randperm(SAMPLES // world_size(), generator=self.generator)
        while self.next + self.micro <= len(self.order):
            chosen = self.order[self.next : self.next + self.micro] * world_size() + rank()
            self.next += self.micro
            yield DATA.x[chosen], DATA.y[chosen]
        self.next = 0

    def state_dict(self) -> dict:
        place = {"next": self.next, "order": self.order.clone(), "pair": (rank(), b"\0" * 2000)}
        return {**place, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        assert state["pair"] == (rank(), b"\0" * 2000)
        if not self.forgetful:
            self.next, self.order = state["next"], state["order"]
            self.generator.set_state(state["generator"])


def same_batches():
    for first in range(0, SAMPLES, 2):
        yield DATA.x[first : first + 2], DATA.y[first : first + 2]


def loaders(micro: int) -> dict:
    return {
        "own stream": lambda: DataLoader(OwnStream(), batch_size=micro),
        "own stream with workers": lambda: DataLoader(
            OwnStream(), batch_size=micro, num_workers=1, multiprocessing_context="fork"
        ),
        "stateful": lambda: Stateful(micro),
        "forgetful": lambda: Stateful(micro, forgetful=True),
        "samples": SameStream,
        "same batches": lambda: same_batches,
        "own samples": OwnStream,
    }


def train(name: str, folder: str, settings: dict, kill: tuple | None = None) -> None:
    """Train on this rank; leave an error in a file beside the run."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 4))
    config = TrainerConfig(
        **{
            "output_dir": folder,
            "batch_size": BATCH,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "log_data_digest": True,
            "save_steps": 2,
            "optim": "adamw_torch",
            **settings,
        }
    )
    try:
        trainer = Trainer(
            model,
            config,
            loaders(config.per_forward)[name](),
            loss_fn=nn.CrossEntropyLoss(),
            callbacks=callbacks_for(kill),
            display=NoDisplay(),
        )
        trainer.train()
    except UnbrokenError as error:
        Path(f"{folder}-error-{rank()}").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


def callbacks_for(kill: tuple | None) -> list[Callback]:
    return [] if kill is None else [Kill(*kill)]
