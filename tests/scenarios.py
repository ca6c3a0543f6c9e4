"""Small runs with everything that can break a resume, trained in fresh processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fresh import run_fresh
from sabotage_runs import leave_out
from unbroken.storage import CompressedStorage, storage_at
from unbroken.store import CheckpointReader
from unbroken.testing import KillingStorage
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

SAMPLES, BATCH, EPOCHS = 40, 8, 3
STEPS_PER_EPOCH = SAMPLES // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Scenario:
    """What a run is made of."""

    model: str = "dropout"  # dropout | batchnorm | tied
    optimizer: str = "adamw_torch"  # adamw_torch | sgd | adafactor
    precision: str = "fp32"  # fp32 | bf16 | fp16
    shuffle: bool = True
    augmentation: bool = True
    random_collator: bool = True
    workers: int = 0
    accumulation: int = 1


@dataclass(frozen=True)
class Cut:
    """Where a run is killed: in a step, or at a durable step of the save after it."""

    step: int
    save_steps: int
    storage_step: int | None = None

    @property
    def checkpoint(self) -> int:
        """The step of the newest checkpoint that the killed run leaves."""
        return (self.step - 1) // self.save_steps * self.save_steps

    @property
    def logged(self) -> int:
        """The last step of which the killed run leaves a line of metrics."""
        return self.step - 1 if self.storage_step is None else self.step


CUTS = {
    "first step": Cut(step=1, save_steps=5),
    "mid-epoch": Cut(step=5, save_steps=3),
    "epoch edge": Cut(step=6, save_steps=5),
    "second epoch": Cut(step=10, save_steps=4),
    "last step": Cut(step=15, save_steps=7),
    "inside a save": Cut(step=6, save_steps=3, storage_step=12),
}


class Samples:
    """Random vectors with labels; augmentation draws from all three global generators."""

    def __init__(self, augmentation: bool) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(SAMPLES, 6, generator=generator)
        self.y = torch.randint(0, 4, (SAMPLES,), generator=generator)
        self.augmentation = augmentation

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index]
        if self.augmentation:
            x = x + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return x, self.y[index]


def noisy_collate(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.stack([sample[0] for sample in samples])
    return x * (torch.rand_like(x) > 0.1), torch.stack([sample[1] for sample in samples])


class Tied(nn.Module):
    """A model with one weight under two names, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.outer = nn.Linear(6, 6)
        self.outer.weight = self.inner.weight
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.dropout(torch.relu(self.inner(x)), 0.2, self.training)
        return self.head(self.outer(x))


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind == "tied":
        return Tied()
    middle = nn.BatchNorm1d(16) if kind == "batchnorm" else nn.Dropout(0.2)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), middle, nn.Linear(16, 4))


class KillInStep(Callback):
    """SIGKILLs its own process in the middle of a step, after a backward pass."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_micro_batch_end(self, trainer: Trainer) -> None:
        if trainer.progress.step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInSave(Callback):
    """Arms a storage so that the process dies at the given durable step of the next save."""

    def __init__(self, step: int, storage_step: int) -> None:
        self.step, self.storage_step = step, storage_step

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.progress.step == self.step:
            trainer.checkpointer.run.storage.arm(self.storage_step)


class ArmedStorage(KillingStorage):
    """Kills its process at a durable step counted from a moment of the run."""

    def arm(self, steps: int) -> None:
        self._kill_at = self.steps + steps


class ArmedCompressedStorage(CompressedStorage):
    """An armed storage in which every file of tensors is kept compressed."""

    def __init__(self, folder: str) -> None:
        super().__init__(ArmedStorage(folder), least_bytes=1)

    def arm(self, steps: int) -> None:
        self._inner.arm(steps)


def make_trainer(
    scenario: Scenario,
    folder: str,
    cut: Cut | None,
    save_steps: int,
    armed: type[ArmedStorage | ArmedCompressedStorage] = ArmedStorage,
) -> Trainer:
    config = TrainerConfig(
        output_dir=folder,
        batch_size=BATCH,
        micro_batch_size=BATCH // scenario.accumulation,
        num_train_epochs=EPOCHS,
        shuffle=scenario.shuffle,
        dataloader_num_workers=scenario.workers,
        optim=scenario.optimizer,
        learning_rate=0.01,
        sgd_momentum=0.9,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        bf16=scenario.precision == "bf16",
        fp16=scenario.precision == "fp16",
        logging_steps=1,
        log_data_digest=True,
        save_steps=save_steps,
    )
    callbacks: list[Callback] = []
    storage = armed(folder) if armed is ArmedCompressedStorage else None
    if cut is not None and cut.storage_step is not None:
        storage = armed(folder)
        callbacks = [KillInSave(cut.step, cut.storage_step)]
    elif cut is not None:
        callbacks = [KillInStep(cut.step)]
    trainer = Trainer(
        make_model(scenario.model),
        config,
        Samples(scenario.augmentation),
        callbacks=callbacks,
        collate_fn=noisy_collate if scenario.random_collator else None,
        loss_fn=nn.CrossEntropyLoss(),
        display=NoDisplay(),
        storage=storage,
    )
    # A callback is a part of the state; the one that kills must not be.
    trainer.checkpointer.objects["callbacks"] = {}
    return trainer


def train(
    scenario: Scenario,
    folder: str,
    save_steps: int,
    cut: Cut | None = None,
    left_out: str | None = None,
    armed: type[ArmedStorage | ArmedCompressedStorage] = ArmedStorage,
) -> None:
    """Train in this process; `left_out` names a part of the state that a resume leaves out."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    trainer = make_trainer(scenario, folder, cut, save_steps, armed)
    if left_out is not None:
        leave_out(trainer, left_out)
    trainer.train()


def outcome(folder: Path, step: int = STEPS) -> dict:
    """Return what a finished run left: all tensors, all other state, every line of metrics.

    Without the measured times alone.
    """
    reader = CheckpointReader(storage_at(folder), f"checkpoint-{step}")
    tensors = {path: region.digest for path, region in reader.manifest.tensors.items()}
    state = json.loads(reader.read_file("state.json"))
    for measured in ("seconds", "logged_seconds"):
        del state["statistics"]["state"][measured]
    return {"tensors": tensors, "state": state, "metrics": metrics(folder)}


def metrics(folder: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the measured times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def uninterrupted(scenario: Scenario, folder: Path) -> dict:
    """Return what the run ends with that nobody touched; it is one and the same for all cuts.

    It saves at its beginning and its end alone. Runs that are cut save more often, each at a
    cadence of its own, and are compared with all that this one leaves: so the comparison shows
    as well that nothing in the state depends on how often it is saved.
    """
    assert run_fresh(train, scenario, str(folder / "whole"), STEPS) == 0
    return outcome(folder / "whole")


@dataclass(frozen=True)
class KilledRun:
    """A run as a kill left it; it may be resumed again and again, each time by the same command."""

    scenario: Scenario
    cut: Cut
    folder: Path

    def resumed(self, left_out: str | None = None) -> dict:
        """Resume it, in a fresh process, and return what it ends with."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        run = shutil.copytree(self.folder / "killed", self.folder / "run")
        arguments = (self.scenario, str(run), self.cut.save_steps, None, left_out)
        assert run_fresh(train, *arguments) == 0
        return outcome(run)


def killed(scenario: Scenario, cut: Cut, folder: Path) -> KilledRun:
    """Train in a fresh process, until it is killed where the cut says."""
    run = folder / "run"
    assert run_fresh(train, scenario, str(run), cut.save_steps, cut) == -signal.SIGKILL
    assert max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")) == cut.checkpoint
    run.rename(folder / "killed")
    return KilledRun(scenario, cut, folder)
