"""Fine-tune a few adapters with PEFT: the frozen base is stored once, however often is saved.

    python examples/lora.py --output_dir runs/lora

Each checkpoint is whole: it holds the base as a hard link to the first one's file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from texts import blocks_of, learned_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
    default_data_collator,
)

from unbroken.adapters.transformers import Trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", default="runs/lora")
    parser.add_argument("--base", help="a model, such as a checkpoint of gpt2_finetune.py")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--save_steps", type=int, default=20)
    given = parser.parse_args()

    tokenizer = learned_tokenizer(vocab_size=1024)
    torch.manual_seed(0)
    if given.base is not None:
        base = AutoModelForCausalLM.from_pretrained(given.base)
    else:
        end = tokenizer.eos_token_id
        size = {"n_positions": 64, "n_layer": 4, "n_head": 8, "n_embd": 256}
        ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
        base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size, **ends))
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = Trainer(
        get_peft_model(base, lora),
        TrainingArguments(
            output_dir=given.output_dir,
            max_steps=given.max_steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",  # so that a later --max_steps only makes the run longer
            save_steps=given.save_steps,
            logging_steps=10,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=blocks_of(tokenizer, length=64),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    print(f"mean loss of the whole run: {trainer.train().training_loss:.6f}")
    found = Path(given.output_dir).glob("checkpoint-*")
    for folder in sorted(found, key=lambda path: int(path.name.split("-")[1])):
        written = [file.stat() for file in folder.iterdir()]
        own = sum(one.st_size for one in written if one.st_nlink == 1)
        print(folder.name, f"{own:,} bytes of its own of {sum(one.st_size for one in written):,}")


if __name__ == "__main__":
    main()
