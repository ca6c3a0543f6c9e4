"""A run and branches of it, trained in fresh processes by the same script."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fresh import run_fresh
from scenarios import KillInStep, Samples, leave_out, make_model, noisy_collate
from unbroken.testing import KillingStorage
from unbroken.training import NoDisplay, Trainer, TrainerConfig

LEAVES_AT, STEPS = 5, 15
NAME = "lr-low"
BRANCH: dict[str, Any] = {"branch": NAME, "resume_from_checkpoint": LEAVES_AT}
LOWER: dict[str, Any] = {**BRANCH, "learning_rate": 0.002, "allow": ("learning_rate",)}


def train(
    folder: str,
    settings: dict[str, Any],
    in_step: int | None = None,
    at_storage_step: int | None = None,
    left_out: str | None = None,
) -> None:
    """Train in this process; kill it in a step, or at a durable step of the storage."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    defaults: dict[str, Any] = {
        "output_dir": folder,
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": STEPS,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "log_data_digest": True,
        "save_steps": LEAVES_AT,
    }
    storage = None
    if at_storage_step is not None:
        storage = KillingStorage(folder, kill_at=at_storage_step)
    trainer = Trainer(
        make_model("dropout"),
        TrainerConfig(**{**defaults, **settings}),
        Samples(augmentation=True),
        callbacks=[] if in_step is None else [KillInStep(in_step)],
        collate_fn=noisy_collate,
        loss_fn=nn.CrossEntropyLoss(),
        display=NoDisplay(),
        storage=storage,
    )
    trainer.checkpointer.objects["callbacks"] = {}  # the one that kills is no part of the state
    if left_out is not None:
        leave_out(trainer, left_out)
    trainer.train()


def train_fresh(folder: Path, settings: dict[str, Any], **how: Any) -> int:
    """Train in a fresh process; return its exit code (-9: killed)."""
    kill = (how.get("in_step"), how.get("at_storage_step"), how.get("left_out"))
    return run_fresh(train, str(folder), settings, *kill)


def child_of(folder: Path) -> Path:
    return folder / "branches" / NAME
