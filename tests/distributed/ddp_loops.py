"""Hand-written loops around DistributedDataParallel, which a Checkpointer saves and resumes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from distributed.models import Shuffled, SometimesUnused
from unbroken.checkpoint import Checkpointer
from unbroken.distributed import Group, join

STEPS = 6


class EitherOrder(nn.Module):
    """Two branches; which one is used first, and so has its gradients last, the step says."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = (self.one, self.other) if self.calls % 2 == 0 else (self.other, self.one)
        self.calls += 1
        for branch in branches:
            x = torch.tanh(branch(x))
        return self.head(x)


class OneUnused(Shuffled):
    """Has a parameter that no pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Parameter(torch.ones(3))


class WithStatistics(nn.Module):
    """Has buffers that DDP gives to all ranks as rank 0 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.norm, self.first = nn.Linear(9, 4), nn.BatchNorm1d(9), nn.Linear(6, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


@dataclass(frozen=True)
class Loop:
    """A way to train: what DDP is told, and where it is built and saved."""

    options: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = Shuffled
    cuts: tuple[int, ...] = (3,)
    micro_batches: int = 1
    built_late: bool = False
    saves_wrapper: bool = True
    given_group: bool = True
    resumed: dict[str, Any] = field(default_factory=dict)
    hook: tuple[Any, Any] | None = None


LOOPS = {
    "plain": Loop(cuts=(3, 5)),
    "after the first step": Loop(cuts=(1,)),
    "before the first step": Loop(cuts=(0, 2)),
    "small buckets": Loop({"bucket_cap_mb": 0.001}),
    "views": Loop({"gradient_as_bucket_view": True}, micro_batches=2),
    "static": Loop({"static_graph": True}),
    "static, with an unused parameter": Loop({"static_graph": True}, model=OneUnused),
    "unused parameters": Loop({"find_unused_parameters": True}, model=SometimesUnused),
    "accumulation": Loop(micro_batches=3, cuts=(1, 4)),
    "built after the resume": Loop(built_late=True, saves_wrapper=False, cuts=(1, 4)),
    "another order in each step": Loop(model=EitherOrder),
    "statistics": Loop(model=WithStatistics),
    "a hook": Loop(hook=(None, default_hooks.allreduce_hook)),
}
TOLD = {
    "static, after the first step": Loop({"static_graph": True}, cuts=(1,)),
    "other buckets": Loop(resumed={"bucket_cap_mb": 0.001}),
    "no unused parameters any more": Loop(
        {"find_unused_parameters": True}, resumed={"find_unused_parameters": False}
    ),
    "no group": Loop(given_group=False),
    "a hook with a state": Loop(hook=(PowerSGDState, powerSGD_hook)),
}


def wrapped(model: nn.Module, loop: Loop, resumed: bool) -> DistributedDataParallel:
    ddp = DistributedDataParallel(model, **{**loop.options, **(loop.resumed if resumed else {})})
    if loop.hook is not None:
        state, hook = loop.hook
        ddp.register_comm_hook(state if state is None else state(None), hook)
    return ddp


def train(folder: str, name: str, loop: Loop, group: Group, last: int) -> None:
    """Train to a step, from where the run stands; leave the weights and what was told."""
    torch.manual_seed(3)
    model = loop.model()
    ddp = None if loop.built_late else wrapped(model, loop, os.path.exists(f"{folder}/{name}/run"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    where = f"{folder}/{name}/run" + ("" if loop.given_group else str(group.rank))
    with Checkpointer(
        where,
        ranks=group if loop.given_group else None,
        model=ddp if loop.saves_wrapper else model,
        optimizer=optimizer,
    ) as checkpointer:
        report = checkpointer.resume()
        ddp = wrapped(model, loop, False) if ddp is None else ddp
        for step in range(report.step, last):
            train_step(ddp, optimizer, loop.micro_batches, step, group.rank)
        checkpointer.save(last)
    leave(Path(folder, name), model, [str(one) for one in report.differences], group.rank)


def train_step(ddp: Any, optimizer: Any, micro_batches: int, step: int, rank: int) -> None:
    for number in range(micro_batches):
        torch.manual_seed(1000 * step + 10 * number + rank)
        ddp.require_backward_grad_sync = number == micro_batches - 1  # as no_sync does
        ddp(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def leave(folder: Path, model: nn.Module, told: list[str], rank: int) -> None:
    if rank == 0:
        state = {name: value.numpy().tobytes().hex() for name, value in model.state_dict().items()}
        (folder / "outcome").write_text(json.dumps([state, told]))


def train_all(folder: str, part: int | None) -> None:
    """Train all loops: in one piece, or up to the next cut of each, and be killed."""
    group = join(timeout=60.0)
    for name, loop in {**LOOPS, **TOLD}.items():
        ends = (STEPS,) if part is None else (*loop.cuts, STEPS)
        if part is None or part < len(ends):
            train(folder, name, loop, group, ends[part or 0])
    with contextlib.suppress(RuntimeError):  # another rank may be dead already
        dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)
