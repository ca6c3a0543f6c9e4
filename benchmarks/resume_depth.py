"""Time from `train()` to the end of the first resumed step, after 10, 10^4 and 10^6 steps.

    python benchmarks/resume_depth.py [--rounds 5]

The run that is resumed has really the position of that step: its order of data, its schedule, and
one line of metrics for every ten steps. Each measurement has its own process; depths take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from machine import measured_in_a_fresh_process, median, write

DEPTHS = (10, 10_000, 1_000_000)
SAMPLES, BATCH = 1_000_003, 8


class Vectors:
    """A million samples, made when asked for."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        import torch

        x = torch.full((16,), index / SAMPLES)
        return x, x.sum()


def make_trainer(folder: str, max_steps: int, callbacks=()):
    import torch

    from unbroken.training import NoDisplay, Trainer, TrainerConfig

    config = TrainerConfig(
        output_dir=folder,
        batch_size=BATCH,
        max_steps=max_steps,
        lr_scheduler_type="constant",  # the length of the run is another one after a resume
        save_steps=None,
        save_at_start=False,
        logging_steps=10,
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1)
    )
    loss = torch.nn.MSELoss()
    return Trainer(
        model,
        config,
        Vectors(),
        callbacks=callbacks,
        loss_fn=lambda outputs, labels: loss(outputs[:, 0], labels),
        display=NoDisplay(),
    )


def prepare(depth: str, folder: str) -> None:
    """Make the run directory of a run that has taken `depth` steps."""
    from dataclasses import replace

    from unbroken.data import Position

    steps = int(depth)
    trainer = make_trainer(folder, max_steps=10)
    trainer.train()  # ten real steps, which fill the optimizer's state
    for step in range(20, steps + 1, 10):
        trainer.checkpointer.log({"step": step, "loss": 1 / step, "learning_rate": 5e-5})
    trainer.progress = replace(trainer.progress, step=steps, samples=steps * BATCH)
    trainer.source.load_state_dict({**trainer.source.state_dict(), "samples": steps * BATCH})
    assert trainer.source.position == Position(samples=steps * BATCH)
    trainer.scheduler.last_epoch = steps
    trainer.save_checkpoint()
    trainer.checkpointer.close()
    print(json.dumps({"metrics_bytes": (Path(folder) / "metrics.jsonl").stat().st_size}))


def resume(depth: str, folder: str) -> None:
    from unbroken.training import Callback

    times = []

    class FirstStep(Callback):
        def on_step_end(self, trainer) -> None:
            times.append(time.perf_counter())
            trainer.stop()

    trainer = make_trainer(folder, max_steps=int(depth) + 100)
    trainer.callbacks.append(FirstStep())
    trainer.save_checkpoint = lambda: ""  # the next measurement resumes the same checkpoint
    started = time.perf_counter()
    report = trainer.train().resume_report
    assert report.step == int(depth), report
    print(json.dumps({"seconds": times[0] - started}))


def compare(rounds: int) -> dict:
    seconds: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    with tempfile.TemporaryDirectory() as folder:
        for depth in DEPTHS:
            measured_in_a_fresh_process(__file__, "--prepare", depth, f"{folder}/{depth}")
        for _ in range(rounds):
            for depth in DEPTHS:
                one = measured_in_a_fresh_process(__file__, "--resume", depth, f"{folder}/{depth}")
                seconds[depth].append(one["seconds"])
    medians = {depth: median(values) for depth, values in seconds.items()}
    ratio = max(medians.values()) / min(medians.values())
    for depth, value in medians.items():
        print(f"after {depth:>9,} steps: {value * 1e3:8.1f} ms")
    print(f"max / min: {ratio:.2f}")
    return {"rounds": rounds, "seconds": medians, "max_over_min": ratio, "all": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prepare", nargs=2, metavar=("DEPTH", "FOLDER"))
    parser.add_argument("--resume", nargs=2, metavar=("DEPTH", "FOLDER"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    if arguments.prepare:
        prepare(*arguments.prepare)
    elif arguments.resume:
        resume(*arguments.resume)
    else:
        write("resume_depth", compare(arguments.rounds))
