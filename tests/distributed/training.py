"""Runs of several ranks for the tests: a small model with dropout, accumulation and clipping."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from clocks import Jumping
from scenarios import ArmedStorage, KillInSave
from unbroken.distributed import join
from unbroken.errors import UnbrokenError
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

SAMPLES, BATCH, STEPS = 40, 8, 8


class Samples:
    """Random vectors with augmentation drawn from a global generator."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(SAMPLES, 6, generator=generator)
        self.y = torch.randint(0, 4, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        return self.x[index] + 0.1 * torch.randn(6), self.y[index]


class Kill(Callback):
    """SIGKILLs one rank in the middle of a step."""

    def __init__(self, rank: int, step: int, number: int = signal.SIGKILL) -> None:
        self.rank, self.step, self.number = rank, step, number

    def on_micro_batch_end(self, trainer) -> None:
        if trainer.group.rank == self.rank and trainer.progress.step == self.step - 1:
            os.kill(os.getpid(), self.number)


def make_trainer(
    folder: str, settings: dict, kill: tuple | None = None, seed: int = 3, **parts
) -> Trainer:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    parts = {"model": model, "loss_fn": nn.CrossEntropyLoss(), **parts}
    config = TrainerConfig(
        **{
            "output_dir": folder,
            "batch_size": BATCH,
            "max_steps": STEPS,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "log_data_digest": True,
            "save_steps": 3,
            "optim": "adamw_torch",
            **settings,
        }
    )
    return Trainer(
        config=config,
        eval_dataset=Samples() if config.evaluates else None,
        display=NoDisplay(),
        **{
            "train_dataset": Samples(),
            "callbacks": [] if kill is None else [Kill(*kill)],
            **parts,
        },
    )


def train(folder: str, settings: dict, kill: tuple | None = None) -> None:
    """Train on this rank, as a script under torchrun would."""
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    make_trainer(folder, settings, kill).train()


class Draw(Callback):
    """Moves the ambient generators of one rank, as a script of its own might."""

    def on_step_end(self, trainer) -> None:
        with trainer.randomness.users_generators():
            torch.rand(1)


def train_by_own_clock(seed: int, folder: str, settings: dict) -> None:
    """Train on this rank with a clock that no other has."""
    make_trainer(folder, settings, clock=Jumping(seed)).train()


def train_in_turn(special: dict, folder: str) -> None:
    """Train on this rank with a peculiarity of its own; leave the error in a file."""
    rank, settings, parts = os.environ["RANK"], {}, {}
    if "learning_rate" in special:
        settings["learning_rate"] = special["learning_rate"]
    if "draws" in special:
        parts["callbacks"] = [Draw()]
    if "timeout" in special:
        parts["group"] = join(timeout=special["timeout"])
    if "in_save" in special and rank == "0":
        step, storage_step = special["in_save"]
        parts["storage"] = ArmedStorage(f"{folder}/run")
        parts["callbacks"] = [KillInSave(step, storage_step)]
    try:
        seed = special.get("seed_of_model", 3)
        make_trainer(f"{folder}/run", settings, special.get("kill"), seed, **parts).train()
    except UnbrokenError as error:
        text = "\n".join([type(error).__name__, str(error), *getattr(error, "__notes__", [])])
        causes = f"{type(error).__mro__} {text}"
        Path(folder, f"error-{rank}").write_text(causes)
        sys.exit(3)
