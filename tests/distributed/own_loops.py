"""Loops over `steps` and `epochs` on several ranks, around DDP and FSDP2; ranks that go astray."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from loops.scripts_of_loops import Noisy
from unbroken import Checkpointer
from unbroken.distributed import Group, join
from unbroken.errors import RankError

STEPS = 5


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def alone(model: nn.Module) -> nn.Module:
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp2": sharded,
    "none": alone,
}


class OwnLoop:
    """A model on this rank and its Checkpointer; `steps` and `epochs` train it."""

    def __init__(self, folder: str, wrapper: str, group: Group, *, loader: bool = False) -> None:
        torch.manual_seed(5 + group.rank)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 4))
        for one in model.parameters():
            dist.broadcast(one.data, 0)
        self.model = WRAPPERS[wrapper](model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        data: Any = Noisy(24)
        if loader:
            data = DataLoader(data, 4, sampler=DistributedSampler(data, 2, group.rank))
        self.size = None if loader else 4
        self.told = open(Path(folder) / f"told.{group.rank}", "a", buffering=1)  # noqa: SIM115
        self.run = Checkpointer(
            Path(folder) / "run",
            ranks=group,
            save_steps=2,
            tell=lambda line: print(line, file=self.told),
            data=data,
            model=self.model,
            optimizer=self.optimizer,
        )

    def train(self, batch: torch.Tensor) -> None:
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, at: Callable[[int], object]) -> None:
        for batch in self.run.steps(STEPS, batch_size=self.size):
            self.train(batch)
            at(self.run.step)

    def epochs(self, at: Callable[[int], object]) -> None:
        for _ in self.run.epochs(2, batch_size=self.size):
            for batch in self.run.batches():
                self.train(batch)
                at(self.run.step)

    def bits(self) -> str:
        """Return the weights whole, and the generators of this rank."""
        weights = [one.detach() for one in self.model.parameters()]
        whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in weights]
        return repr([self.run.step, torch.get_rng_state().tolist(), *(w.tolist() for w in whole)])


def train_on_a_rank(kill: bool, folder: str, wrapper: str, loop: str, kill_at: int) -> None:
    """Train; be killed after a step, or leave the bits."""
    group = join(timeout=30.0)
    own = OwnLoop(folder, wrapper, group, loader=loop == "epochs")

    def at(step: int) -> None:
        if kill and step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    getattr(own, loop)(at)
    (Path(folder) / f"bits.{group.rank}").write_text(own.bits())
    own.run.close()
    group.close()


ASTRAY = 3  # the turn in which rank 0 goes another way than rank 1


def go_astray(way: str, wrapper: str, folder: str) -> None:
    """Take another way on rank 0 alone; write down how each rank ends."""
    dist.init_process_group("gloo")  # of the user, and waits half an hour
    group = join(timeout=2.0)
    own = OwnLoop(folder, wrapper, group)
    turns, how = 0, "ended well"
    try:
        for batch in own.run.steps(STEPS, batch_size=4):
            turns += 1
            is_here = group.rank == 0 and turns == ASTRAY
            if is_here and way == "continue":
                continue
            if is_here and way == "break":
                break
            own.model(batch).square().mean().backward()
            if is_here and way == "continue after the backward pass":
                continue
            own.optimizer.step()
            own.optimizer.zero_grad()
            if is_here and way == "stop":
                own.run.stop()
    except (RankError, RuntimeError) as error:
        how = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    (Path(folder) / f"how.{group.rank}").write_text(f"{own.run.step} {how}")
    sys.exit(how != "ended well")


def stop_in_an_evaluation(folder: str) -> None:
    """Call stop() on rank 0 alone, behind the batches of the first epoch."""
    group = join(timeout=10.0)
    own = OwnLoop(folder, "ddp", group, loader=True)
    for _ in own.run.epochs(3):
        for batch in own.run.batches():
            own.train(batch)
        if group.rank == 0:
            own.run.stop()
    (Path(folder) / f"how.{group.rank}").write_text(str(own.run.step))
    own.run.close()
    group.close()
