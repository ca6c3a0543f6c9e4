"""A small run, made through the store: no training is needed to look at files."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from unbroken.store import CheckpointWriter, RunDirectory

BEGUN = 1_769_860_800.0  # 2026-01-31 12:00:00 UTC

RUN_ID = "0123456789abcdef" * 2


CADENCE = {
    "cadence": {
        "seconds": 33.4,
        "steps": 412,
        "text": "saves every 412 steps (33 s): a save costs 0.05 s, failures every 3.1 h (given)",
    }
}


@dataclass(frozen=True)
class Bytes:
    """A leaf of plain bytes."""

    path: str
    file: str
    name: str
    data: bytes
    dtype: str = "U8"
    offsets: None = None
    global_shape: None = None
    copied: None = None

    @property
    def shape(self):
        return (len(self.data),)

    @property
    def nbytes(self):
        return len(self.data)

    def chunks(self):
        yield memoryview(self.data)


def make_run(folder: Path, *, steps=(0, 10, 20), fill=7, seconds=3) -> Path:
    """Make a run with checkpoints at these steps, as a training leaves it."""
    now = itertools.count(BEGUN, 60.0)
    with RunDirectory.open(folder, clock=lambda: next(now), new_id=lambda: RUN_ID) as run:
        run.history.append(_started(step=0))
        for step in steps:
            run.metrics.append(metrics(step))
            save(run, step, fill, seconds, clock=lambda: next(now))
            run.history.append({"event": "saved", "step": step, "digest": "0" * 32, **CADENCE})
        run.metrics.append({"step": steps[-1], "eval_loss": 3.25})
        run.history.append({"event": "stopped", "step": steps[-1], "by": "SIGTERM"})
        run.history.append(_started(step=10, checkpoint="/runs/gpt2/checkpoint-10"))
    return folder


def metrics(step):
    """Return the record of one step."""
    digest = f"{step:032x}"
    return {"step": step, "loss": 3.0 - step / 100, "data_digest": digest, "seconds": 1.5 * step}


def save(run, step, fill, seconds, clock):
    """Save one checkpoint of 3 tensors and a file of values."""
    with CheckpointWriter(run.storage, step=step, run_id=run.run_id, clock=clock) as writer:
        weight = Bytes("model.w", "model.safetensors", "w", bytes([fill]) * 1000)
        moment = Bytes("optimizer.state.w.m", "optimizer.safetensors", "state.w.m", b"m" * 40)
        random = Bytes("rng.torch", "state.safetensors", "rng.torch", b"r" * 16)
        writer.write_leaves([weight, moment, random])
        writer.write_file("state.json", b'{"seconds": %d, "samples": 1}' % seconds)
        writer.commit(
            {
                "best_step": 10,
                "progress": {"step": step, "samples": 8 * step, "epoch": step / 10},
                "config": {"learning_rate": 0.001, "lr_scheduler_type": "cosine"},
                "environment": {"python": "3.11.2", "torch": "2.13.0"},
            }
        )


def _started(*, step, checkpoint=None):
    rejected = [{"checkpoint": "checkpoint-20", "reason": "state.json: is missing"}]
    moved = [{"from": "checkpoint-20", "to": "set-aside/checkpoint-20.1"}]
    return {
        "event": "started",
        "step": step,
        "checkpoint": checkpoint,
        "rejected": [] if checkpoint is None else rejected,
        "set_aside": [] if checkpoint is None else moved,
        "previous_owner": None if checkpoint is None else "host a, process 7",
        "notes": [],
    }


def in_a_process(*arguments, cwd, timeout=120, env=None):
    """Run `python -m unbroken` in a process of its own."""
    command = [sys.executable, "-m", "unbroken", *(str(one) for one in arguments)]
    return subprocess.run(
        command, cwd=cwd, timeout=timeout, env=env, capture_output=True, text=True, check=False
    )
