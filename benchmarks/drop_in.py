"""Steps per second of our Hugging Face Trainer beside transformers' own, and what a save takes.

    python benchmarks/drop_in.py [--rounds 8]

Both train the same GPT-2 on the same blocks in one process, in turns, with one thread; each
round's ratio is of two runs beside each other. Timed: from the first step's end to the last one's.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

import unbroken.adapters.transformers as ours
from machine import facts, median, write

SIZES = {
    "tiny GPT-2": ({"n_layer": 2, "n_embd": 32, "vocab_size": 257, "n_positions": 32}, 400),
    "small GPT-2": ({"n_layer": 4, "n_embd": 128, "vocab_size": 2048, "n_positions": 64}, 40),
}


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **more):
        self.times.append(time.perf_counter())


def steps_per_second(trainer_class, size, steps):
    torch.manual_seed(0)
    config = GPT2Config(**size, n_head=4, bos_token_id=0, eos_token_id=0)
    rows = torch.randint(0, size["vocab_size"], (512, size["n_positions"]))
    data = [{"input_ids": row, "labels": row} for row in rows]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=8,
            save_strategy="no", logging_steps=50, report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
        trainer = trainer_class(model, arguments, train_dataset=data, callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    found = {}
    for name, (size, steps) in SIZES.items():
        rounds = []
        for number in range(given.rounds + 1):
            pair = [transformers.Trainer, ours.Trainer]
            rates = {c: steps_per_second(c, size, steps) for c in pair[:: (-1) ** number]}
            rounds.append([rates[one] for one in pair])
        rounds = rounds[1:]  # the first one warms up
        ratios = [mine / theirs for theirs, mine in rounds]
        quartiles = statistics.quantiles(ratios, n=4)
        found[name] = {"rounds": rounds, "ratio": median(ratios), "quartiles": quartiles}
        print(f"{name}: {median(ratios):.3f} of stock; quartiles {quartiles}")
    write("drop_in", {"machine": facts(), "steps_per_second": found})


if __name__ == "__main__":
    main()
