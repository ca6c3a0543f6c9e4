"""Our Trainer, which saves beside the training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trainers.work import LEARNING_RATE, Work, newest_first
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig


class Steps(Callback):
    def __init__(self, work: Work) -> None:
        self._work = work

    def on_step_end(self, trainer) -> None:
        self._work.on_step(trainer.progress.step)


def make(work: Work) -> Trainer:
    config = TrainerConfig(
        output_dir=str(work.folder),
        batch_size=1,
        max_steps=work.max_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",  # the length of the run is another one after a resume
        save_steps=work.save_steps,
        save_total_limit=work.keep,
        save_at_start=False,
        save_compressed=work.compressed,
        save_mode="overlap",
    )
    callbacks = [Steps(work)]
    return Trainer(work.model, config, work.data(), callbacks=callbacks, display=NoDisplay())


def train(work: Work) -> Trainer:
    trainer = make(work)
    trainer.train()
    return trainer


def checkpoints(folder: Path) -> list[Path]:
    return newest_first(folder, "checkpoint-*")[::-1]


def deepen(work: Work, step: int) -> None:
    trainer = make(replace(work, max_steps=2, save_steps=None))
    trainer.train()
    trainer.progress = replace(trainer.progress, step=step, samples=step)
    trainer.source.load_state_dict({**trainer.source.state_dict(), "samples": step})
    trainer.scheduler.last_epoch = step
    trainer.save_checkpoint()
    trainer.checkpointer.close()
