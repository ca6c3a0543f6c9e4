"""Bytes that each checkpoint writes: full fine-tuning, LoRA, a frozen backbone; and compressed.

    python benchmarks/size.py [--quick] [--methods METHOD ...]

GPT-2 124M is trained for three steps, and a checkpoint is made after each. What is counted is
what the file system has to take: a hard link to a file of an earlier checkpoint is no new bytes.
LoRA: rank 8 on the attention, by PEFT. Frozen: all but the last block and the last norm.
Of our own trainer, `seconds` is how long the last save took to be durable, beside the training.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gpt2 import gpt2
from protocol import Protocol
from trainers import TRAINERS, Work, module_of

STEPS = 3


def full(*, quick: bool):
    return gpt2(quick=quick)


def lora(*, quick: bool):
    from peft import LoraConfig, get_peft_model

    to = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(gpt2(quick=quick), to)


def frozen(*, quick: bool):
    model = gpt2(quick=quick)
    model.requires_grad_(False)
    for part in (model.transformer.h[-1], model.transformer.ln_f):
        part.requires_grad_(True)
    return model


TRAININGS = {"full": full, "LoRA": lora, "frozen": frozen}
COMPRESSED = "unbroken compressed"
METHODS = (
    *(f"{name}, {training}" for training in TRAININGS for name in TRAINERS),
    f"{COMPRESSED}, full",
)


def measure(method: str, quick: bool) -> dict[str, float]:
    name, _, training = method.rpartition(", ")
    trainer = module_of("unbroken" if name == COMPRESSED else name)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCHMARK_DIR")) as folder:
        run = Path(folder) / "run"
        model, compressed = (lambda: TRAININGS[training](quick=quick)), name == COMPRESSED
        work = Work(run, model, STEPS, save_steps=1, compressed=compressed)
        made = trainer.train(work)
        first, *later = bytes_written(trainer.checkpoints(run))
    if len(later) != STEPS - 1:
        raise SystemExit(f"{method}: {len(later) + 1} checkpoints in place of {STEPS}")
    seconds = {} if made is None else {"seconds": made.checkpointer.last_save_cost.durable}
    return {"first": first, "later": max(later), "later_over_first": max(later) / first, **seconds}


def bytes_written(checkpoints: list[Path]) -> list[int]:
    """Return how many bytes each checkpoint has that no earlier one has."""
    seen: set[int] = set()
    found = []
    for checkpoint in checkpoints:
        files = [checkpoint, *checkpoint.rglob("*")]
        own = {one.st_ino: one.st_size for one in map(Path.stat, files) if one.st_ino not in seen}
        folders = {file.stat().st_ino for file in files if file.is_dir()}
        found.append(sum(size for file, size in own.items() if file not in folders))
        seen |= set(own)
    return found


def conclude(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what of the first checkpoint each later one of ours writes again, and compressing."""
    plain, packed = (medians.get(f"{name}, full") for name in ("unbroken", COMPRESSED))
    compressing = {} if plain is None or packed is None else ratios(packed, plain)
    return compressing | {
        f"{method}: later over first": one["later_over_first"]
        for method, one in medians.items()
        if method.startswith("unbroken")
    }


def ratios(packed: dict[str, float], plain: dict[str, float]) -> dict[str, float]:
    names = {"later": "bytes", "seconds": "seconds until durable"}
    return {f"compressed over plain: {names[key]}": packed[key] / plain[key] for key in names}


if __name__ == "__main__":
    protocol = Protocol(__file__, __doc__, measure, METHODS, rounds=1)
    if protocol.quick:
        for name in TRAINERS:
            module_of(name)
    protocol.run(conclude)
