"""A loop on ranks that is saved inside an accumulation window, and goes on from there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed.sharded import facts, in_group
from unbroken import Checkpointer

STEPS, WINDOW = 9, 3


def train(folder: str, kind: str, until: int, restores: bool = True) -> None:
    in_group(_train, folder, kind, until, restores)


def _train(group, folder: str, kind: str, until: int, restores: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    net = fully_shard(model) if kind == "fsdp" else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    where = f"{folder}/run"
    with Checkpointer(where, ranks=group, model=model, optimizer=optimizer) as checkpointer:
        step = checkpointer.resume().step
        if not restores:
            optimizer.zero_grad()
        while step < until:
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(9 * step + group.rank))
            is_last = step % WINDOW == WINDOW - 1
            if kind == "ddp":
                net.require_backward_grad_sync = is_last
            (net(x).square().mean() / WINDOW).backward()
            if is_last:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            step += 1
        checkpointer.save(step)
    Path(f"{folder}/found-{group.rank}.json").write_text(json.dumps(facts(model, optimizer)))
