"""Small runs with everything that can break a resume, trained in fresh processes.

A process of `multiprocessing`'s fork server has imported torch and nothing more has happened in
it: as fresh as a new interpreter for all that training can see, at a hundredth of the cost.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unbroken.checkpoint import ResumeReport, resuming
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader
from unbroken.testing import KillingStorage
from unbroken.training import Callback, Silence, Trainer, TrainerConfig

_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["torch._dynamo", "unbroken.training", "unbroken.testing"])

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
    """Where a run is killed: in a step, or inside the save after it."""

    step: int
    save_steps: int
    storage_step: int | None = None


CUTS = {
    "first step": Cut(step=1, save_steps=5),
    "mid-epoch": Cut(step=4, save_steps=3),
    "epoch edge": Cut(step=6, save_steps=5),
    "second epoch": Cut(step=9, save_steps=4),
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


def make_trainer(scenario: Scenario, folder: str, cut: Cut | None, save_steps: int) -> Trainer:
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
    storage = None
    if cut is not None and cut.storage_step is not None:
        storage = ArmedStorage(folder)
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
        display=Silence(),
        storage=storage,
    )
    # A callback is a part of the state; the one that kills must not be.
    trainer.checkpointer.objects["callbacks"] = {}
    return trainer


def train(
    scenario: Scenario, folder: str, cut: Cut | None, save_steps: int, left_out: str | None
) -> None:
    """Train in this process; `left_out` names a part of the state that a resume leaves out."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    trainer = make_trainer(scenario, folder, cut, save_steps)
    if left_out is not None:
        leave_out(trainer, left_out)
    trainer.train()


def leave_out(trainer: Trainer, part: str) -> None:
    """Make a resume forget one part: it has the value of a new process again."""
    if part == "random generators":
        trainer._randomness._scope = Unkeyed()
        resuming.restore_rng = lambda tree: None
        return
    if part == "keys of the samples":
        trainer.source._batches._deterministic = True
        trainer.source._batches._nothing_random = False
        return
    owner = trainer.model if part == "buffers" else trainer.checkpointer.objects[part]
    fresh = copy.deepcopy(owner.state_dict())
    if part == "buffers":
        fresh = {name: fresh[name] for name, _ in owner.named_buffers()}
    load = trainer.checkpointer.resume

    def resume(which: object) -> ResumeReport:
        report = load(which)
        owner.load_state_dict(fresh, **({"strict": False} if part == "buffers" else {}))
        return report

    trainer.checkpointer.resume = resume


class Unkeyed:
    """The ambient generators, as a trainer without keyed randomness would use them."""

    def seed(self, key: int) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def run_fresh(function, *arguments) -> int:
    """Run a function in a fresh process; return its exit code (-9: killed)."""
    process = _FRESH.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def outcome(folder: Path, step: int = STEPS) -> dict:
    """Return what a finished run left: all tensors, all other state, every line of metrics."""
    reader = CheckpointReader(LocalStorage(folder), f"checkpoint-{step}")
    tensors = {path: region.digest for path, (_, region) in reader.manifest.tensors.items()}
    state = json.loads(reader.read_file("state.json"))
    del state["statistics"]  # holds measured times; what it counts is in the metrics
    return {"tensors": tensors, "state": state, "metrics": metrics(folder)}


def metrics(folder: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the measured times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def uninterrupted(scenario: Scenario, folder: Path, save_steps: int) -> dict:
    assert run_fresh(train, scenario, str(folder), None, save_steps, None) == 0
    return outcome(folder)


def killed_and_resumed(
    scenario: Scenario, folder: Path, cut: Cut, left_out: str | None = None
) -> dict:
    killed = run_fresh(train, scenario, str(folder), cut, cut.save_steps, left_out)
    assert killed == -signal.SIGKILL
    assert run_fresh(train, scenario, str(folder), None, cut.save_steps, left_out) == 0
    return outcome(folder)
