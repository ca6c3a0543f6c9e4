"""Runs of several ranks with verified steps; a bit flips on one of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from distributed.sharded_training import build
from distributed.training import make_trainer
from unbroken.distributed import join
from unbroken.errors import StepVerificationError
from verification.flips import AtStep, Once, flip

LAST = {"whole": "3", "fsdp": "head", "tp": "head"}


def train(folder, layout, every, where=None):
    """Train on this rank; leave the digest of the weights, or the error, in a file."""
    rank = int(os.environ["RANK"])
    parts = {} if layout == "whole" else {"group": join(), "model": build(layout, 0.1)}
    if where == "rest" and rank == 1:
        parts["callbacks"] = [AtStep(2, lambda trainer: next(trainer.model.parameters()))]
    settings = {"verify_steps": every, "max_steps": 5, "micro_batch_size": 2}
    trainer = make_trainer(str(folder), settings, **parts)
    if where == "pass" and rank == 1:
        once = Once(7)
        layer: nn.Module = trainer.model.get_submodule(LAST[layout])
        layer.register_forward_hook(lambda _m, _i, output: flip(output) if once() else None)
    try:
        trainer.train()
    except StepVerificationError as error:
        Path(folder, f"error-{rank}").write_text(f"{error.step} {error.rank} {error.tensor}")
        sys.exit(error.exit_code)
    whole = [
        getattr(p, "full_tensor", lambda p=p: p)().detach() for p in trainer.model.parameters()
    ]
    found = b"".join(one.contiguous().view(torch.uint8).numpy().tobytes() for one in whole)
    Path(folder, f"bits-{rank}").write_bytes(found)
