"""Lightning, with its own ModelCheckpoint."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from trainers.work import Work, newest_first, optimizer_for


class Module(LightningModule):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return optimizer_for(self)


class Steps(Callback):
    def __init__(self, work: Work) -> None:
        self._work = work

    def on_train_batch_end(self, trainer, *_) -> None:
        self._work.on_step(trainer.global_step)


def saving(work: Work) -> list[ModelCheckpoint]:
    if work.save_steps is None:
        return []
    kept = {"save_top_k": -1}
    if work.keep is not None:
        kept = {"save_top_k": work.keep, "monitor": "step", "mode": "max"}
    return [
        ModelCheckpoint(
            dirpath=work.folder,
            filename="checkpoint-{step}",
            auto_insert_metric_name=False,
            every_n_train_steps=work.save_steps,
            **kept,
        )
    ]


def make(work: Work) -> Trainer:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        max_steps=work.max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=work.save_steps is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*saving(work), Steps(work)],  # a step is over when its checkpoint is made
        default_root_dir=str(work.folder),
    )


def train(work: Work) -> None:
    found = newest_first(work.folder, "checkpoint-*.ckpt")
    model = work.model()
    model.train()
    loader = torch.utils.data.DataLoader(work.data(), batch_size=1, shuffle=True)
    make(work).fit(Module(model), loader, ckpt_path=found[0] if found else None)


def checkpoints(folder: Path) -> list[Path]:
    return newest_first(folder, "checkpoint-*.ckpt")[::-1]


def deepen(work: Work, step: int) -> None:
    train(replace(work, max_steps=2, save_steps=2))
    made = (work.folder / "checkpoint-2.ckpt").rename(work.folder / f"checkpoint-{step}.ckpt")
    state = torch.load(made, weights_only=True)
    state["global_step"] = step
    counted = state["loops"]["fit_loop"]
    batches = counted["epoch_loop.batch_progress"]
    optimized = counted["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for counts in (batches["total"], batches["current"], optimized["total"], optimized["current"]):
        counts.update(dict.fromkeys(counts, step))
    counted["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    torch.save(state, made)
