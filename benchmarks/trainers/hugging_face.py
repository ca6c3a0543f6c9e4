"""transformers' own Trainer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from trainers.work import LEARNING_RATE, Work, newest_first


class Steps(TrainerCallback):
    def __init__(self, work: Work) -> None:
        self._work = work

    def on_step_end(self, args, state, control, **_) -> None:
        self._work.on_step(state.global_step)


def make(work: Work, trainer_class: type[Trainer] = Trainer) -> Trainer:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = TrainingArguments(
        output_dir=str(work.folder),
        per_device_train_batch_size=1,
        max_steps=work.max_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",  # the length of the run is another one after a resume
        save_strategy="no" if work.save_steps is None else "steps",
        save_steps=work.save_steps or 1,
        save_total_limit=work.keep,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    model = work.model()
    trainer = trainer_class(model, arguments, train_dataset=work.data(), callbacks=[Steps(work)])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train(work: Work) -> None:
    found = newest_first(work.folder, "checkpoint-*")
    make(work).train(resume_from_checkpoint=str(found[0]) if found else None)


def checkpoints(folder: Path) -> list[Path]:
    return newest_first(folder, "checkpoint-*")[::-1]


def deepen(work: Work, step: int) -> None:
    make(replace(work, max_steps=2, save_steps=2)).train()
    made = (work.folder / "checkpoint-2").rename(work.folder / f"checkpoint-{step}")
    state = json.loads((made / "trainer_state.json").read_text())
    (made / "trainer_state.json").write_text(json.dumps({**state, "global_step": step}))
    schedule = torch.load(made / "scheduler.pt", weights_only=True)
    torch.save({**schedule, "last_epoch": step}, made / "scheduler.pt")
