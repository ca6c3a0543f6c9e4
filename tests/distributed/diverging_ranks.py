"""Ranks that should have the same state, and some that should not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from distributed.ddp_loops import WithStatistics
from unbroken.checkpoint import Checkpointer, RankPolicy, RunFacts
from unbroken.distributed import Group, join
from unbroken.errors import RankError

LARGE = 3000  # its square is more than is compared whole
STEPS, CUT = 4, 2


class WithExpert(nn.Module):
    """A body that all ranks share, and an expert that each has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.expert = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expert(torch.tanh(self.body(x)))


class Loop:
    """What a rank trains: a model, an optimizer, and whatever else is saved."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        self.model, self.rank = model, rank
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        self.more: dict[str, Any] = {}

    def step(self, number: int) -> None:
        torch.manual_seed(100 * number + self.rank)
        self.model(torch.randn(8, 6)).square().mean().backward()
        for name, parameter in self.model.named_parameters():
            if "expert" not in name and not isinstance(self.model, DistributedDataParallel):
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()


def expert(rank: int) -> Loop:
    return Loop(WithExpert(), rank)


def trained_expert(rank: int) -> Loop:
    loop = expert(rank)
    loop.step(0)
    return loop


def drifted_weight(rank: int) -> Loop:
    loop = Loop(
        nn.Sequential(nn.Linear(6, LARGE), nn.Linear(LARGE, LARGE), nn.Linear(LARGE, 4)), rank
    )
    with torch.no_grad():
        loop.model[1].weight += 1e-3 * (rank == 1)
    return loop


def one_element(rank: int) -> Loop:
    loop = Loop(nn.Linear(300, 300), rank)
    with torch.no_grad():
        loop.model.weight[123, 45] += rank
    return loop


def drifted_moments(rank: int) -> Loop:
    loop = Loop(nn.Linear(6, 4), rank)
    loop.step(0)
    loop.optimizer.state[loop.model.weight]["exp_avg"] += rank
    return loop


def other_learning_rate(rank: int) -> Loop:
    loop = Loop(nn.Linear(6, 4), rank)
    loop.optimizer.param_groups[0]["lr"] *= 1 + rank
    return loop


def own_statistics(rank: int) -> Loop:
    loop = Loop(WithStatistics(), rank)
    loop.step(0)
    return loop


def unnamed_schedule(rank: int) -> Loop:
    loop = Loop(nn.Linear(6, 4), rank)
    loop.more["scheduler"] = torch.optim.lr_scheduler.StepLR(loop.optimizer, 10)
    loop.more["scheduler"].last_epoch = rank
    return loop


def statistics_of_rank_0(rank: int) -> Loop:
    loop = Loop(DistributedDataParallel(WithStatistics()), rank)
    loop.more["average"] = AveragedModel(loop.model.module, use_buffers=True)
    for number in range(2):
        loop.step(number)
        loop.more["average"].update_parameters(loop.model.module)
    return loop


def another_schedule(rank: int) -> Loop:
    loop = unnamed_schedule(rank)
    loop.more["scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0 ** (rank + 1))
    return loop


@dataclass(frozen=True)
class Case:
    """How a loop is saved, and the error: none where `says` is empty."""

    make: Callable[[int], Loop]
    says: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    of_a_trainer: bool = False


OWN = {"per_rank": ("model", "optimizer", "rng", "values")}
CASES = {
    "an expert of each rank": Case(
        trained_expert,
        ("rank 1: model.expert.", 'per_rank=["model", "optimizer", "rng", "values"]'),
    ),
    "an expert of each rank in a Trainer": Case(
        trained_expert, ("rank 1: model.expert.", "sum all gradients"), of_a_trainer=True
    ),
    "a weight that drifted": Case(drifted_weight, ("rank 1: model.1.weight",)),
    "one element": Case(one_element, ("rank 1: model.weight: is not what",)),
    "moments that drifted": Case(drifted_moments, ("rank 1: optimizer.state.weight.exp_avg",)),
    "another learning rate": Case(other_learning_rate, ("optimizer",)),
    "statistics that nobody gives to all": Case(
        own_statistics, ("rank 1: model.norm.running_mean", "(and 1 more tensor")
    ),
    "a schedule that is not named": Case(
        unnamed_schedule, ("scheduler",), {"per_rank": ("rng", "values")}
    ),
    "an expert that is stored for each rank": Case(trained_expert, options=OWN),
    "statistics of rank 0, and an average of them": Case(statistics_of_rank_0),
    "another schedule, and another scale": Case(another_schedule),
    "a schedule of rank 0 for all": Case(
        another_schedule,
        ("scaler: not covered: the ranks hold different states", "scheduler: not covered"),
        {"per_rank": ()},
    ),
    "a schedule that may differ": Case(
        another_schedule, options={"per_rank": (), "may_differ": ("scaler", "scheduler")}
    ),
    "a schedule that rank 0 stores for all": Case(
        unnamed_schedule, ("scheduler: not covered",), {"read_from": "rank0"}
    ),
}


def save_all(folder: str) -> None:
    """Save all cases, and leave what was raised."""
    group, told = join(timeout=60.0), {}
    for number, (name, case) in enumerate(CASES.items()):
        seed_all(3)
        loop = case.make(group.rank)
        told[name] = saved(f"{folder}/{number}", loop, group, case)
    Path(folder, f"told-{group.rank}").write_text(json.dumps(told))
    group.close()


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def saved(folder: str, loop: Loop, group: Group, case: Case) -> str:
    objects, told = {"model": loop.model, "optimizer": loop.optimizer, **loop.more}, []
    more = {"tell": told.append, "settings": RunFacts(is_complete=case.of_a_trainer), **objects}
    with Checkpointer(folder, ranks=RankPolicy(group, **case.options), **more) as checkpointer:
        try:
            checkpointer.resume()
            checkpointer.save(1)
        except RankError as error:
            return "\n".join([str(error), *getattr(error, "__notes__", ())])
    lines = group.broadcast("what was told", [line for line in told if "not covered" in line])
    return "\n".join(map(str, lines))


def train_experts(folder: str, last: int) -> None:
    """Train experts that are stored for each rank, up to a step; leave what they became."""
    group = join(timeout=60.0)
    torch.manual_seed(3 + group.rank)
    loop = expert(group.rank)
    dist.broadcast(loop.model.body.weight.data, 0)
    dist.broadcast(loop.model.body.bias.data, 0)
    objects = {"model": loop.model, "optimizer": loop.optimizer}
    with Checkpointer(f"{folder}/run", ranks=RankPolicy(group, **OWN), **objects) as checkpointer:
        report = checkpointer.resume()
        for step in range(report.step, last):
            loop.step(step)
        checkpointer.save(last)
    weights = {
        name: value.numpy().tobytes().hex() for name, value in loop.model.state_dict().items()
    }
    Path(folder, f"weights-{group.rank}").write_text(json.dumps([weights, report.lines()]))
    with contextlib.suppress(RuntimeError):  # another rank may be dead already
        dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)
