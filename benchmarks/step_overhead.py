"""Steps per second of our Trainer over a bare PyTorch loop of the same arithmetic, beside peers.

    python benchmarks/step_overhead.py [--rounds 12]

The protocol: each measurement has its own process, on one core and with one thread. A round
measures every method once, and who goes first rotates from round to round. A process's figure
is the median of its steps, from step WARM to the last but one: no start, no save and no end is
in it. What is stated is the median over the rounds, and the speed over the bare loop *of the
same round*: its median and its quartiles. All use fused AdamW, the default of transformers and
ours.

What the records of steps cost is measured apart: in one process of our Trainer they are made and
not made in turns of TURN steps, and the medians of both kinds of steps are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from itertools import pairwise
from statistics import median, quantiles

from machine import measured_in_a_fresh_process, write

METHODS = ("bare", "unbroken", "transformers", "lightning")
SIZES = {
    "tiny": {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64, "block": 8, "batch": 2},
    "small": {
        "n_layer": 6,
        "n_embd": 320,
        "n_head": 5,
        "vocab_size": 8192,
        "block": 64,
        "batch": 4,
    },
}
STEPS = {"tiny": 1200, "small": 40}
WARM = {"tiny": 200, "small": 5}
TURN = {"tiny": 40, "small": 4}
LEARNING_RATE, LOGGING_STEPS, SEED = 1e-4, 10, 0


def model_and_data(size: str):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(SIZES[size])
    block, batch = shape.pop("block"), shape.pop("batch")
    torch.manual_seed(SEED)
    config = GPT2Config(**shape, n_positions=block, bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(0, shape["vocab_size"], (64, block))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return GPT2LMHeadModel(config), data, batch


class Watch:
    """Notes the time at the end of each step."""

    def __init__(self, size: str) -> None:
        self.first, self.last = WARM[size], STEPS[size] - 1
        self.times: list[float] = []

    def step(self, step: int) -> None:
        if self.first <= step <= self.last:
            self.times.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        return median([after - before for before, after in pairwise(self.times)])


def bare(size: str, watch: Watch, folder: str) -> None:
    import torch

    model, data, batch = model_and_data(size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
    )
    steps = STEPS[size]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True)
    model.train()
    step, total = 0, 0.0
    while step < steps:
        for inputs in loader:
            loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item()
            step += 1
            watch.step(step)
            if step >= steps:
                return


def unbroken(size: str, watch: Watch, folder: str, *, in_turns: bool = False) -> None:
    from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

    class Stopwatch(Callback):
        def on_step_end(self, trainer) -> None:
            watch.step(step := trainer.progress.step)
            if in_turns:
                observer = trainer.checkpointer.confirmation.observer
                observer.is_recording = step // TURN[size] % 2 == 0

    model, data, batch = model_and_data(size)
    config = TrainerConfig(
        output_dir=folder,
        batch_size=batch,
        max_steps=STEPS[size],
        learning_rate=LEARNING_RATE,
        logging_steps=LOGGING_STEPS,
        save_steps=None,
        seed=SEED,
    )
    Trainer(model, config, data, callbacks=[Stopwatch()], display=NoDisplay()).train()


def transformers(size: str, watch: Watch, folder: str) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stopwatch(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            watch.step(state.global_step)

    model, data, batch = model_and_data(size)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        max_steps=STEPS[size],
        learning_rate=LEARNING_RATE,
        logging_steps=LOGGING_STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=SEED,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[Stopwatch()]).train()


def lightning(size: str, watch: Watch, folder: str) -> None:
    import torch
    from lightning import Callback, LightningModule
    from lightning import Trainer as LightningTrainer

    class Module(LightningModule):
        def __init__(self, model) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(
                self.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
            )
            steps = STEPS[size]
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Stopwatch(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            watch.step(trainer.global_step)

    model, data, batch = model_and_data(size)
    model.train()
    trainer = LightningTrainer(
        max_steps=STEPS[size],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        log_every_n_steps=LOGGING_STEPS,
        callbacks=[Stopwatch()],
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=batch, shuffle=True)
    trainer.fit(Module(model), loader)


def records_in_turns(size: str, watch: Watch, folder: str) -> None:
    unbroken(size, watch, folder, in_turns=True)


def cost_of_records(size: str, watch: Watch) -> float:
    """Return the median of steps with records over that of steps without, less 1."""
    steps = list(enumerate(pairwise(watch.times), watch.first))  # after step, from its end on
    both: dict[bool, list[float]] = {True: [], False: []}
    for step, (before, after) in steps:
        both[step // TURN[size] % 2 == 0].append(after - before)
    return median(both[True]) / median(both[False]) - 1


def measure(method: str, size: str) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    watch = Watch(size)
    with tempfile.TemporaryDirectory() as folder:
        globals()[method](size, watch, folder)
    found = {"seconds": watch.seconds_per_step()}
    if method == "records_in_turns":
        found["records"] = cost_of_records(size, watch)
    print(json.dumps(found))


def compare(size: str, rounds: int) -> dict:
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds):
        first = number % len(METHODS)  # nobody always runs after the same other
        for method in METHODS[first:] + METHODS[:first]:
            one = measured_in_a_fresh_process(__file__, "--measure", method, size)
            seconds[method].append(one["seconds"])
    records = [
        measured_in_a_fresh_process(__file__, "--measure", "records_in_turns", size)["records"]
        for _ in range(rounds)
    ]
    return {
        "rounds": rounds,
        "records_over_a_step": median(records),
        "all_records": records,
        "seconds_per_step": {method: median(values) for method, values in seconds.items()},
        "speed_over_bare": {method: spread(seconds, method) for method in METHODS},
        "all": seconds,
    }


def spread(seconds: dict[str, list[float]], method: str) -> dict[str, float]:
    """Return the quartiles of the speed over the bare loop of the same round."""
    ratios = [bare / own for bare, own in zip(seconds["bare"], seconds[method], strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {"lower_quartile": low, "median": middle, "upper_quartile": high}


def show(size: str, result: dict) -> None:
    for method in METHODS:
        microseconds = result["seconds_per_step"][method] * 1e6
        low, middle, high = result["speed_over_bare"][method].values()
        print(f"{size:6} {method:13} {microseconds:9.0f} us  {middle:.3f} [{low:.3f}, {high:.3f}]")
    print(f"{size:6} records of steps cost {100 * result['records_over_a_step']:.1f} % of a step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "SIZE"))
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
    else:
        results = {size: compare(size, arguments.rounds) for size in SIZES}
        for size, result in results.items():
            show(size, result)
        write("step_overhead", {"sizes": results})
