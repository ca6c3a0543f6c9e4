"""The resume tests that other trainers publish, held here to equal bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fresh import run_fresh
from scenarios import metrics, outcome
from unbroken.checkpoint import Checkpointer, Clock, SavePolicy
from unbroken.storage import MemoryStorage
from unbroken.store import KeepEvery, KeepPolicy
from unbroken.training import NoDisplay, Trainer, TrainerConfig


class Regression:
    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(samples, 5, generator=generator)
        self.y = torch.randn(samples, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def composer_run(folder: str, max_steps: int, save_steps: int, resume: int | str) -> None:
    """24 samples, batch 2, 5 batches an epoch, 2 epochs, Adam, ExponentialLR(0.9)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    config = TrainerConfig(
        output_dir=folder,
        batch_size=2,
        samples_per_epoch=10,
        max_steps=max_steps,
        save_steps=save_steps,
        logging_steps=1,
    )
    trainer = Trainer(
        model,
        config,
        Regression(24),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        loss_fn=nn.MSELoss(),
        display=NoDisplay(),
    )
    trainer.train(resume)


# (steps between saves, step that is resumed), after Composer's test_checkpoint.py: saves by
# batches and by epochs (5 batches), resumed in mid-epoch and at the ends of both epochs.
SAVE_AND_RESUME = [(2, 4), (1, 5), (2, 6), (5, 5), (5, 10), (2, 2)]


@pytest.mark.parametrize(("save_steps", "resume_at"), SAVE_AND_RESUME)
def test_composers_save_and_resume_points_end_with_equal_bits(save_steps, resume_at, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_fresh(composer_run, str(whole), 10, save_steps, "auto") == 0
    assert run_fresh(composer_run, str(resumed), 10, save_steps, "auto") == 0
    assert run_fresh(composer_run, str(resumed), 10, save_steps, resume_at) == 0
    assert outcome(resumed, 10) == outcome(whole, 10)


def test_torchtitans_three_runs_have_equal_losses(tmp_path):
    reference, saved = tmp_path / "reference", tmp_path / "saved"
    assert run_fresh(composer_run, str(reference), 10, 5, "never") == 0
    assert run_fresh(composer_run, str(saved), 5, 5, "never") == 0
    assert run_fresh(composer_run, str(saved), 10, 5, "must") == 0
    losses = [[line["loss"] for line in metrics(folder)] for folder in (reference, saved)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 10


def test_levanters_retention_list_is_kept_under_a_time_and_a_step_policy():
    seconds = [0.0]
    storage = MemoryStorage()
    every = (KeepEvery(2, until=10), KeepEvery(5, until=20), KeepEvery(10))
    checkpointer = Checkpointer(
        storage,
        save=SavePolicy(minutes=10 / 60),
        keep=KeepPolicy(last=1, every=every),
        clock=Clock(monotonic=lambda: seconds[0]),
        weight=torch.zeros(2),
    )
    with checkpointer:
        checkpointer.resume()
        for step in range(1, 50):
            seconds[0] += 10
            checkpointer.save_if_due(step)
        steps = [step for step, _ in checkpointer.run.catalog.folders()]
    assert steps == [2, 4, 6, 8, 10, 15, 20, 30, 40, 49]
