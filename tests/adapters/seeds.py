"""Scripts as users find them explained, with a small GPT-2 and a play in the place of hub names.

Only the first import differs: `from unbroken.adapters.transformers import Trainer`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, TrainingArguments, logging

SMALL = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 4}


def make_pretrained(order: dict) -> None:
    """Save a model and a tokenizer, as if they came from the hub: dropout is on."""
    from tokenizers import ByteLevelBPETokenizer

    from unbroken.language_model import builtin_text

    learned = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    learned.train([str(builtin_text())], 400, special_tokens=[end], show_progress=False)
    GPT2Tokenizer(tokenizer_object=learned._tokenizer, eos_token=end).save_pretrained(order["out"])
    learned.save_model(order["out"])
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(
        order["out"]
    )


def load_dataset(tokenizer: Any) -> dict:
    from unbroken.language_model import builtin_text

    ids = tokenizer(builtin_text().read_text()[:6000])["input_ids"]
    blocks = [torch.tensor(ids[i : i + 32]) for i in range(0, len(ids) - 31, 32)]
    return {"train": [{"input_ids": block, "labels": block} for block in blocks]}


def basic(order: dict) -> None:
    """Example 1: the checkpoint stands in the arguments."""
    from unbroken.adapters.transformers import Trainer

    model_name = order["gpt2"]
    model = GPT2LMHeadModel.from_pretrained(model_name)
    tokenizer = GPT2Tokenizer.from_pretrained(model_name)
    dataset = load_dataset(tokenizer)
    training_args = TrainingArguments(
        output_dir="./results",
        per_device_train_batch_size=4,
        num_train_epochs=3,
        resume_from_checkpoint=order.get("path"),  # Path to your checkpoint
        **SMALL,
    )
    trainer = Trainer(model=model, args=training_args, train_dataset=dataset["train"])
    trainer.train()
    told(order, trainer)


def mismatch(order: dict) -> None:
    """Example 2: arguments from a file, a lower learning rate, the checkpoint given to Trainer."""
    from unbroken.adapters.transformers import Trainer

    model = GPT2LMHeadModel.from_pretrained(order["gpt2"])
    dataset = load_dataset(GPT2Tokenizer.from_pretrained(order["gpt2"]))
    with open("./training_config.json") as f:
        training_args_dict = json.load(f)
    training_args = TrainingArguments(**training_args_dict)

    # Update training arguments if necessary (e.g., reduce learning rate)
    training_args.learning_rate = 1e-5

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"],
        resume_from_checkpoint=order["path"],
    )
    trainer.train()
    told(order, trainer)


def many(order: dict) -> None:
    """Example 3: the newest of several checkpoints, quiet, with gradient accumulation."""
    from unbroken.adapters.transformers import Trainer

    model = GPT2LMHeadModel.from_pretrained(order["gpt2"])
    dataset = load_dataset(GPT2Tokenizer.from_pretrained(order["gpt2"]))
    latest_checkpoint = order.get("word") or newest_by_name("./results")
    logging.set_verbosity_error()
    training_args = TrainingArguments(
        output_dir="./results",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        resume_from_checkpoint=latest_checkpoint,
        **SMALL,
    )
    trainer = Trainer(model=model, args=training_args, train_dataset=dataset["train"])
    trainer.train()
    told(order, trainer)


def newest_by_name(checkpoint_dir: str) -> str:
    checkpoints = [
        os.path.join(checkpoint_dir, name)
        for name in os.listdir(checkpoint_dir)
        if os.path.isdir(os.path.join(checkpoint_dir, name)) and "checkpoint" in name
    ]
    return max(checkpoints, key=lambda x: int(x.split("-")[-1]))


def told(order: dict, trainer: Any) -> None:
    from adapters.callbacks import digest_of

    log = [line for line in trainer.state.log_history if "loss" in line]
    found = {
        "step": trainer.state.global_step,
        "digest": digest_of(trainer.model),
        "rate": trainer.lr_scheduler.base_lrs[0],
        "report": trainer.resume_report.lines(),
        "began": trainer.resume_report.step,
        "log": log,
    }
    Path(order["result"]).write_text(json.dumps(found))
