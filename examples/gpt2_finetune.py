"""Train a GPT-2 on a play with the Hugging Face Trainer; killed and started again, it goes on.

    python examples/gpt2_finetune.py --output_dir runs/hamlet

Only one import differs from a script for transformers' own Trainer.
"""

from __future__ import annotations

import argparse

import torch
from texts import blocks_of, learned_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, default_data_collator

from unbroken.adapters.transformers import Trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="runs/gpt2")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--resume_from_checkpoint")
    given = parser.parse_args()

    tokenizer = learned_tokenizer(vocab_size=1024)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_layer=4,
        n_head=4,
        n_embd=128,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = Trainer(
        GPT2LMHeadModel(config),  # or GPT2LMHeadModel.from_pretrained("gpt2")
        TrainingArguments(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=given.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            save_steps=given.save_steps,
            save_total_limit=3,
            logging_steps=10,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            resume_from_checkpoint=given.resume_from_checkpoint,
        ),
        train_dataset=blocks_of(tokenizer, length=64),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    print(f"mean loss of the whole run: {trainer.train().training_loss:.6f}")


if __name__ == "__main__":
    main()
