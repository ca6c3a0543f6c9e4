"""Runs that are asked to stop or save in the middle of a step; and evaluations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from distributed.training import BATCH, make_trainer
from unbroken.distributed import join
from unbroken.errors import UnbrokenError
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig


class SaveInWindow(Callback):
    """One rank asks for a save after the first micro-batch of a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step
        self.told: str | None = None

    def on_micro_batch_end(self, trainer) -> None:
        begun = trainer.progress.step == self.step - 1 and trainer.progress.pending == 1
        if begun and trainer.group.rank == self.rank:
            self.told = Path(trainer.save_checkpoint()).name

    def on_step_end(self, trainer) -> None:
        if trainer.progress.step == self.step and trainer.group.rank == self.rank:
            assert self.told == f"checkpoint-{self.step}"


class Stop(Callback):
    """Ends the run when its save is made, inside the window too."""

    def on_save(self, trainer, checkpoint: str) -> None:
        if trainer.progress.pending:
            os._exit(0)


def save_in_window(folder: str, settings: dict, rank: int, step: int) -> None:
    make_trainer(folder, settings, callbacks=[SaveInWindow(rank, step), Stop()]).train()


def train_or_tell(folder: str, settings: dict) -> None:
    """Train on this rank; leave an error beside the run."""
    try:
        make_trainer(folder, settings).train()
    except UnbrokenError as error:
        Path(f"{folder}-error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


class Numbers:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        return torch.full((6,), 0.1 * index), torch.tensor(index % 4)


class Noted(nn.Sequential):
    """Writes down which samples it has seen."""

    used: tuple[float, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.used = (*self.used, *x[:, 0].tolist())
        return super().forward(x)


def evaluate(folder: str) -> None:
    """Leave the loss of several evaluation sets, and which samples this rank has used for each."""
    group = join(timeout=60.0)
    told = []
    for count, size in ((1, 4), (3, 2), (10, 4), (17, 3), (16, 4)):
        torch.manual_seed(3)
        model = Noted(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        config = TrainerConfig(
            output_dir=f"{folder}/run", batch_size=BATCH, eval_steps=1, eval_batch_size=size
        )
        trainer = Trainer(
            model,
            config,
            Numbers(40),
            eval_dataset=Numbers(count),
            loss_fn=nn.CrossEntropyLoss(),
            display=NoDisplay(),
            group=group,
        )
        told.append([trainer.evaluate()["eval_loss"].hex(), model.used])
    Path(folder, f"evaluated-{group.world_size}-{group.rank}").write_text(json.dumps(told))
    group.close()
    os._exit(0)
