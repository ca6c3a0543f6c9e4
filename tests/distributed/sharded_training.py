"""Trainers whose model is sharded over the ranks in one of the ways that PyTorch has."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distributed.training import make_trainer

WORLDS = {"whole": 1, "ddp": 2, "fsdp": 2, "tp": 2, "fsdp x tp": 4, "ddp x tp": 4, "hsdp": 4}
SHARDED = [layout for layout in WORLDS if layout not in ("whole", "ddp")]


class Net(nn.Module):
    """A block to cut by columns and rows, between layers that tensor parallelism leaves whole."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.up, self.down = nn.Linear(10, 16), nn.Linear(16, 10)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.inner(x))
        return self.head(x + self.down(self.dropout(torch.relu(self.up(x)))))


def build(layout: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    model = Net(dropout)
    ways = {
        "fsdp": ((2,), ("data",)),
        "tp": ((2,), ("tensor",)),
        "hsdp": ((2, 2), ("copies", "data")),
    }
    if layout in ("whole", "ddp"):
        return model
    shape, names = ways.get(layout, ((2, 2), ("data", "tensor")))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if "tp" in layout:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    if "fsdp" in layout or layout == "hsdp":
        over = mesh if layout == "hsdp" else mesh["data"]
        fully_shard(model.up, mesh=over)
        fully_shard(model, mesh=over)
    return model


def train(
    layout: str, folder: str, settings: dict, kill: tuple | None = None, dropout: float = 0.0
) -> None:
    """Train on this rank; the ranks end at once, as gloo may not survive their interpreters."""
    model = build(layout, dropout)
    make_trainer(folder, settings, kill, model=model).train()
    os._exit(0)
