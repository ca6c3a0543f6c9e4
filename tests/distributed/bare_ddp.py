"""A loop of its own around DistributedDataParallel, which resumes all that it can see."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distributed.models import Shuffled
from distributed.ranks import run_ranks

STEPS, CUT = 6, 3


def train(folder: str, first: int, last: int) -> None:
    """Train from one step to another, from the file that step left to the file of the other."""
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    model = DistributedDataParallel(Shuffled())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if first > 0:
        stored = torch.load(Path(folder, f"{first}.pt"))
        model.module.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
    for step in range(first, last):
        torch.manual_seed(100 * step + dist.get_rank())
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, Path(folder, f"{last}.pt"))
    dist.barrier()
    os._exit(0)  # gloo may not survive the end of an interpreter that holds DDP


def ends_with(folder: Path, *cuts: int) -> dict[str, bytes]:
    """Train in one process a rank for each stretch between cuts; return the last weights."""
    folder.mkdir()
    for first, last in zip((0, *cuts), (*cuts, STEPS), strict=True):
        assert run_ranks(train, str(folder), first, last, world_size=4) == [0] * 4
    weights = torch.load(folder / f"{STEPS}.pt")["model"]
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
