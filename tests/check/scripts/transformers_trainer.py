"""A stock transformers Trainer; `--bug NAME` breaks it in one way.

python transformers_trainer.py --out FOLDER [--bug NAME]
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--bug", default="")
arguments = parser.parse_args()

torch.manual_seed(0)
config = GPT2Config(
    n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8, bos_token_id=0, eos_token_id=0
)
tokens = torch.randint(0, 32, (48, 8))
data = [{"input_ids": row, "labels": row} for row in tokens]


def mask(samples):
    """Replace tokens at random: a collator that draws from the global generator."""
    ids = torch.stack([sample["input_ids"] for sample in samples])
    noisy = torch.where(torch.rand(ids.shape) < 0.15, torch.zeros_like(ids), ids)
    return {"input_ids": noisy, "labels": ids}


trainer = Trainer(
    GPT2LMHeadModel(config),
    TrainingArguments(
        output_dir=str(arguments.out),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        save_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        seed=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ignore_data_skip=arguments.bug == "ignore_data_skip",
    ),
    train_dataset=data,
    data_collator=mask if arguments.bug == "random masking" else None,
)
last = get_last_checkpoint(str(arguments.out))
if arguments.bug == "lost optimizer" and last is not None:
    (Path(last) / "optimizer.pt").unlink()
if arguments.bug == "resume_from_checkpoint in the arguments":
    trainer.args.resume_from_checkpoint = last
    last = None
trainer.train(resume_from_checkpoint=last)
