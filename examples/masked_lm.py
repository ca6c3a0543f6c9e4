"""Masked language modelling: the collator masks at random, and a resumed run masks the same.

    python examples/masked_lm.py --output_dir runs/masked

With transformers' own Trainer such a run goes on with other masks after a resume.
"""

from __future__ import annotations

import argparse

import torch
from texts import blocks_of, learned_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from unbroken.adapters.transformers import Trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="runs/masked")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()

    tokenizer = learned_tokenizer(vocab_size=1024)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    blocks = [{"input_ids": one["input_ids"]} for one in blocks_of(tokenizer, length=64)]
    trainer = Trainer(
        BertForMaskedLM(config),
        TrainingArguments(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            save_steps=given.save_steps,
            save_total_limit=3,
            logging_steps=10,
            dataloader_num_workers=given.workers,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=blocks,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        processing_class=tokenizer,
    )
    print(f"mean loss of the whole run: {trainer.train().training_loss:.6f}")


if __name__ == "__main__":
    main()
