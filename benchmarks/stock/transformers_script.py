"""A stock transformers Trainer: python transformers_script.py --out DIR --case NAME."""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--case", default="defaults")
given = parser.parse_args()
CASE = given.case

torch.manual_seed(0)
config = GPT2Config(
    n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0
)
tokens = torch.randint(0, 32, (48, 8))
data = [{"input_ids": row, "labels": row} for row in tokens]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data)


def padded(samples):
    """Collate texts of several lengths."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [
        torch.nn.functional.pad(sample["input_ids"], (0, longest - len(sample["input_ids"])))
        for sample in samples
    ]
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


def masked(samples):
    """Replace tokens at random, as masked language modelling does."""
    ids = torch.stack([sample["input_ids"] for sample in samples])
    return {"input_ids": torch.where(torch.rand(ids.shape) < 0.15, 0, ids), "labels": ids}


options = {
    "epoch end": {"save_steps": 12},
    "accumulation": {"gradient_accumulation_steps": 2},
    "workers": {"dataloader_num_workers": 2},
    "random collator, workers": {"dataloader_num_workers": 2},
    "random collator, epoch end": {"save_steps": 12},
    "length groups": {"train_sampling_strategy": "group_by_length"},
    "ignore_data_skip": {"ignore_data_skip": True},
}.get(CASE, {})
collator = masked if "random collator" in CASE else None
if CASE == "length groups":
    lengths = torch.randint(3, 16, (48,)).tolist()
    data = [{"input_ids": torch.randint(0, 32, (n,)), "labels": None} for n in lengths]
    collator = padded
trainer = Trainer(
    GPT2LMHeadModel(config),
    TrainingArguments(
        **{
            "output_dir": given.out,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "max_steps": 36 if CASE == "iterable data" else -1,
            "save_steps": 5,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "seed": 0,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **options,
        }
    ),
    train_dataset=Stream() if CASE == "iterable data" else data,
    data_collator=collator,
)
last = get_last_checkpoint(given.out)
if CASE == "resume_from_checkpoint in TrainingArguments":
    trainer.args.resume_from_checkpoint = last
    last = None
trainer.train(resume_from_checkpoint=last)
