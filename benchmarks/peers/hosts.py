"""The checkpoints of transformers' Trainer and of Lightning, made by their own code."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from lightning import LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as hf_logging

from peers.method import Method


class Transformers(Method):
    def __init__(self, model, optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
        self._trainer = Trainer(model, arguments, optimizers=(optimizer, None))
        self._trainer.create_scheduler(10, optimizer)

    def path(self, number: int) -> Path:
        return self.folder / f"checkpoint-{number}"

    def write(self, path: Path) -> None:
        self._trainer.state.global_step = int(path.name.rpartition("-")[2])
        self._trainer._save_checkpoint(self.model, trial=None)

    def load(self, number: int) -> None:
        path = str(self.path(number))
        self._trainer._load_from_checkpoint(path)
        self._trainer._load_optimizer_and_scheduler(path)


class Lightning(Method):
    plugins: tuple = ()

    def __init__(self, model, optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        warnings.filterwarnings("ignore", module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self._trainer = LightningTrainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
            plugins=[plugin() for plugin in self.plugins],
        )
        model.train()
        self._trainer.fit(Module(model, optimizer), torch.arange(32).view(1, 1, 32))

    def write(self, path: Path):
        self._trainer.save_checkpoint(path)

    def load(self, number: int) -> None:
        connector = self._trainer._checkpoint_connector
        connector.resume_start(self.path(number))
        connector.restore_model()
        connector.restore_training_state()
        connector.resume_end()


class LightningAsync(Lightning):
    plugins = (AsyncCheckpointIO,)

    def write(self, path: Path):
        super().write(path)
        one_at_a_time = self._trainer.strategy.checkpoint_io._executor
        return one_at_a_time.submit(lambda: None).result


class Module(LightningModule):
    def __init__(self, model, optimizer) -> None:
        super().__init__()
        self.model, self._optimizer = model, optimizer

    def training_step(self, inputs, index):
        return self.model(input_ids=inputs, labels=inputs).loss

    def configure_optimizers(self):
        return self._optimizer
