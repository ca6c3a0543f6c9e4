"""Trainers whose model is sharded over the ranks in one of the ways that PyTorch has."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from distributed.training import Samples, make_trainer
from sabotage_runs import leave_out
from unbroken.distributed import join
from unbroken.errors import ConfigError, RankError
from unbroken.training import Trainer, TrainerConfig

WORLDS = {"whole": 1, "ddp": 2, "fsdp": 2, "tp": 2, "fsdp x tp": 4, "ddp x tp": 4, "hsdp": 4}
SHARDED = [layout for layout in WORLDS if layout not in ("whole", "ddp")]


class Net(nn.Module):
    """A block to cut by columns and rows, between layers that tensor parallelism leaves whole."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.up, self.down = nn.Linear(10, 16), nn.Linear(16, 10)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.inner(x))
        return self.head(x + self.down(self.dropout(torch.relu(self.up(x)))))


def mesh_of(layout: str) -> DeviceMesh:
    one = {"fsdp": ("data",), "tp": ("tensor",)}
    names = one.get(layout, ("copies", "data") if layout == "hsdp" else ("data", "tensor"))
    return init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)


def build(layout: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    model = Net(dropout)
    if layout in ("whole", "ddp"):
        return model
    mesh = mesh_of(layout)
    if "tp" in layout:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    if "fsdp" in layout or layout == "hsdp":
        over = mesh if layout == "hsdp" else mesh["data"]
        fully_shard(model.up, mesh=over)
        fully_shard(model, mesh=over)
    return model


def train(
    layout: str,
    folder: str,
    settings: dict,
    kill: tuple | None = None,
    dropout: float = 0.0,
    left_out: str | None = None,
) -> None:
    """Train on this rank; the ranks end at once, as gloo may not survive their interpreters."""
    trainer = make_trainer(folder, settings, kill, model=build(layout, dropout))
    if left_out is not None:
        leave_out(trainer, left_out)
    trainer.train()
    os._exit(0)


def run_the_document(block: str, folder: str) -> None:
    """Run lines of a document with the names that they take for granted."""
    torch.manual_seed(3)
    names = {**globals(), "Trainer": Trainer, "model": Net(), "data": Samples()}
    names["config"] = TrainerConfig(output_dir=folder, max_steps=2)
    exec(block, names)
    os._exit(0)


def train_until_a_rank_is_gone(folder: str) -> None:
    """Kill rank 1 in the middle of a run; leave the error of rank 0 in a file."""
    model = build("fsdp")
    try:
        make_trainer(folder, {}, (1, 4), model=model, group=join(timeout=600.0)).train()
    except RankError as error:
        Path(folder, "error").write_text(str(error))
    os._exit(0)


def sharded_in_part() -> nn.Module:
    model = Net()
    fully_shard(model.up, mesh=mesh_of("fsdp"))
    return model


def with_batch_statistics() -> nn.Module:
    return fully_shard(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), mesh=mesh_of("fsdp"))


def on_a_part_of_the_ranks() -> nn.Module:
    alone = DeviceMesh("cpu", [torch.distributed.get_rank()])
    return parallelize_module(Net(), alone, {"up": ColwiseParallel()})


def with_a_hook_of_its_own() -> nn.Module:
    model = DistributedDataParallel(Net())
    model.register_comm_hook(None, lambda _, bucket: bucket.buffer())
    return model


REFUSED = {
    "lanes in FSDP": (lambda: build("fsdp"), {"lanes": 2}, "lanes"),
    "fp16 in FSDP": (lambda: build("fsdp"), {"fp16": True}, "fp16"),
    "fp16 in tensor parallelism": (lambda: build("tp"), {"fp16": True}, "fp16"),
    "a part that nobody shards": (sharded_in_part, {}, "model.inner.weight"),
    "batch statistics": (with_batch_statistics, {}, "model.1"),
    "batch statistics of all ranks": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.SyncBatchNorm(4)),
        {},
        "model.1",
    ),
    "a mesh of some ranks": (on_a_part_of_the_ranks, {}, "mesh must hold all ranks"),
    "a hook in DDP": (with_a_hook_of_its_own, {}, "a communication hook"),
    "DDP inside": (lambda: nn.Sequential(DistributedDataParallel(Net())), {}, "Parallel inside"),
}


def refused(folder: str) -> None:
    """Make each Trainer that is refused; leave the errors of rank 0 in files."""
    group = join(timeout=30.0)
    for name, (make, settings, _) in REFUSED.items():
        try:
            make_trainer(f"{folder}/run", settings, model=make(), group=group)
        except ConfigError as error:
            if group.rank == 0:
                Path(folder, name).write_text(str(error))
    group.gather("done", None)
    os._exit(0)
