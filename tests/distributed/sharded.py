"""One small training in every layout of ranks, with a hand-written loop around `Checkpointer`.

The model has what is hard to cut: sizes that no world divides, a bias shorter than the world is
large, tied weights, frozen ones, a buffer, bfloat16, and dropout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from unbroken.checkpoint import Checkpointer
from unbroken.distributed import SingleProcess, join

WORLDS = {
    1: ("single",),
    2: ("ddp-2", "fsdp-2", "tp-2"),
    4: ("fsdp-4", "fsdp-2-tp-2"),
}
LAYOUTS = tuple(layout for layouts in WORLDS.values() for layout in layouts)
SAVED_AT, STEPS = 2, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 10)
        self.down = nn.Linear(10, 5)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.dropout(self.down(torch.relu(self.up(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(5)
        self.score = nn.Linear(5, 3).to(torch.bfloat16)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        self.calls += 1
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x), self.score(x.to(torch.bfloat16)).float()


def build(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = _cut(Net(), layout)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1, foreach=False)
    torch.manual_seed(100 * seed + data_rank(layout))
    return model, optimizer


def _cut(model: nn.Module, layout: str) -> nn.Module:
    kind, *_ = layout.split("-")
    world = 1 if layout == "single" else dist.get_world_size()
    if layout == "single":
        return model
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "tp":
        return _tensor_parallel(model, init_device_mesh("cpu", (world,)))
    if layout == "fsdp-2-tp-2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        return _fully_sharded(_tensor_parallel(model, mesh["tp"]), mesh["dp"])
    return _fully_sharded(model, init_device_mesh("cpu", (world,)))


def _tensor_parallel(model: Net, mesh) -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    return model


def _fully_sharded(model: Net, mesh) -> nn.Module:
    for part in (*model.blocks, model.score):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data_rank(layout: str) -> int:
    """Return which part of the data this rank has; ranks of one tensor-parallel group share it."""
    if layout == "single" or layout.startswith("tp"):
        return 0
    return dist.get_rank() // 2 if layout == "fsdp-2-tp-2" else dist.get_rank()


def train(model, optimizer, layout: str, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + data_rank(layout))
        tokens = torch.randint(0, 7, (4, 3), generator=generator)
        logits, scores = model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        (loss + scores.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def facts(model, optimizer) -> dict[str, str]:
    """Return a digest of each gathered tensor of the weights and of the optimizer's state."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    names = {id(p): name for name, p in bare.named_parameters()}
    tensors = {**dict(bare.named_parameters()), **dict(bare.named_buffers())}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{names[id(parameter)]}.{key}": value for key, value in state.items()}
    return {name: digest(tensor) for name, tensor in sorted(tensors.items())}


def digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    raw = whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{whole.dtype} {list(whole.shape)} {xxhash.xxh3_128_hexdigest(raw)}"


def checkpointer_in(folder: str, group, model, optimizer, **options) -> Checkpointer:
    return Checkpointer(folder, ranks=group, model=model, optimizer=optimizer, **options)


def in_group(function: Callable[..., object], *arguments) -> None:
    """Call a function with the group that this process is in; end without taking torch down."""
    group = join(timeout=60.0) if int(os.environ["WORLD_SIZE"]) > 1 else SingleProcess()
    function(group, *arguments)
    group.close()
    os._exit(0)


def save_all(group, folder: str) -> None:
    """Train and save in every layout of this world; go on to the end without a stop."""
    for layout in WORLDS[group.world_size]:
        model, optimizer = build(layout, seed=1 + LAYOUTS.index(layout))
        train(model, optimizer, layout, range(SAVED_AT))
        with checkpointer_in(f"{folder}/{layout}", group, model, optimizer) as checkpointer:
            checkpointer.save(SAVED_AT, {"note": layout})
        saved = facts(model, optimizer)
        losses = train(model, optimizer, layout, range(SAVED_AT, STEPS))
        end = facts(model, optimizer)
        tell(group, folder, layout, {"saved": saved, "losses": losses, "end": end})


def tell(group, folder: str, name: str, found: dict) -> None:
    told = group.gather("losses", found["losses"]) if "losses" in found else None
    if group.rank == 0:
        Path(folder, f"{name}.json").write_text(json.dumps({**found, "losses": told}))


def load_all(group, folder: str) -> None:
    """Load every saved layout into every layout of this world."""
    for layout in WORLDS[group.world_size]:
        for saved in LAYOUTS:
            model, optimizer = build(layout, seed=20)
            with checkpointer_in(f"{folder}/{saved}", group, model, optimizer) as checkpointer:
                report = checkpointer.resume("must")
                assert report.step == SAVED_AT
                assert checkpointer.values == {"note": saved}
            differs = {one.path: one.verdict for one in report.differences}
            found = {"saved": facts(model, optimizer), "differs": differs}
            tell(group, folder, f"{saved} into {layout}", found)


def go_on_all(group, folder: str) -> None:
    """Resume every layout of this world as it was, and go on; once more with something lost."""
    for layout in WORLDS[group.world_size]:
        for loss, lose in LOSSES.items():
            model, optimizer = build(layout, seed=30)
            with checkpointer_in(f"{folder}/{layout}", group, model, optimizer) as checkpointer:
                checkpointer.resume("must")
            lose(model, optimizer, group)
            losses = train(model, optimizer, layout, range(SAVED_AT, STEPS))
            found = {"losses": losses, "end": facts(model, optimizer)}
            tell(group, folder, f"{layout} after losing {loss}", found)


def _lose_nothing(model, optimizer, group) -> None:
    pass


def _lose_generators(model, optimizer, group) -> None:
    torch.manual_seed(5)


def _lose_a_moment(model, optimizer, group) -> None:
    """Lose what one rank has of one moment of one parameter."""
    state = next(iter(optimizer.state.values()))["exp_avg"]
    local = state.to_local() if isinstance(state, DTensor) else state
    if group.rank == 0:
        local.zero_()


def _lose_step_counters(model, optimizer, group) -> None:
    for state in optimizer.state.values():
        state["step"].zero_()


LOSSES = {
    "nothing": _lose_nothing,
    "generators": _lose_generators,
    "a moment": _lose_a_moment,
    "step counters": _lose_step_counters,
}
