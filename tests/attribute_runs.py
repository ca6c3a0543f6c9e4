"""Small runs whose training depends on attributes that it changes itself, in fresh processes."""

from __future__ import annotations

import copy
import dataclasses
import enum
import json
import os
import signal
from collections import deque
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unbroken.checkpoint import Checkpointer
from unbroken.checkpoint.coverage.attributes import Attributes
from unbroken.distributed import join
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

STEPS = 6


class Phase(enum.Enum):
    WARM, COOL = 1, 2


@dataclasses.dataclass(frozen=True)
class Place:
    temperature: float = 1.0


class Net(nn.Module):
    """Remembers what happened, in attributes of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Layer(), Layer()])
        self.noise = torch.Generator().manual_seed(3)
        self.center, self.queue = None, [torch.zeros(4)]
        self.place, self.phase = Place(), Phase.WARM

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.1 * torch.rand(x.shape, generator=self.noise)
        for layer in self.inner:
            x = layer(x)
        mean = x.detach().mean(0)
        self.center = mean if self.center is None else 0.9 * self.center + 0.1 * mean
        self.queue.append(mean)
        self.place = dataclasses.replace(self.place, temperature=self.place.temperature * 0.9)
        self.phase = Phase.COOL
        return (x - self.center - sum(self.queue[-2:])) / self.place.temperature


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gain, self.seen, self.counts = 1.0, deque(maxlen=2), {"calls": np.float32(0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gain *= 0.95
        self.seen.append(float(x.mean()))
        self.counts["calls"] += 1
        return super().forward(x) * self.gain + sum(self.seen) / self.counts["calls"]


class Counted(torch.optim.SGD):
    """Sets its learning rate by a counter of its own."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=0.1)
        self.taken = 0

    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.taken
        return super().step(closure)


class Average:
    """As many keep it: a copy of the model, a table, and the number of updates."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = 1 - 1 / (1 + self.updates)
        for (name, p), mean in zip(model.named_parameters(), self.model.parameters(), strict=True):
            mean.data.mul_(decay).add_(p, alpha=1 - decay)
            self.shadow[name] = decay * self.shadow[name] + (1 - decay) * p


def seen_in(*modules: nn.Module, more: object = None) -> str:
    return json.dumps([[t.tolist() for t in m.state_dict().values()] for m in modules] + [more])


def loop(folder: str, stop: int = 0, forget: bool = False) -> None:
    """Train by hand; ends by SIGKILL in step `stop`."""
    if forget:
        Attributes.restore = lambda *_, **__: None
    torch.manual_seed(0)
    net = Net()
    optimizer, average = Counted(net.parameters()), Average(net)
    with Checkpointer(folder, model=net, optimizer=optimizer, average=average) as checkpointer:
        report = checkpointer.resume()
        for step in range(report.step, STEPS):
            net(torch.ones(2, 4) * step).pow(2).mean().backward()
            if step + 1 == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            optimizer.zero_grad()
            average.update(net)
            for p, mean in zip(net.parameters(), average.shadow.values(), strict=True):
                p.data.lerp_(mean, 0.1)
            checkpointer.save(step + 1)
    write(folder, report, seen_in(net, average.model, more=average.updates))


def write(folder: str, report, seen: str) -> None:
    Path(f"{folder}.json").write_text(json.dumps({"seen": seen, "report": report.lines()}))


class Curriculum:
    def __init__(self, level: int = 0) -> None:
        self.level, self.read = level, []

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        self.read.append(index)
        return torch.full((4,), float(index * (1 + self.level))), torch.tensor(index % 4)


class Raises(Callback):
    """Makes the data harder, counts, and has what a run shows to people besides."""

    def __init__(self) -> None:
        self.count, self.own_pid, self.meter = 0, None, Meter()

    def on_train_begin(self, trainer) -> None:
        self.count = 0
        self.own_pid = self.own_pid or os.getpid()

    def on_step_end(self, trainer) -> None:
        self.count += 1
        self.meter.add(self.count)
        trainer.data_set.level = self.count // 2
        if trainer.progress.step == trainer.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Meter:
    def __init__(self) -> None:
        self.sum, self.n = 0.0, 0

    def add(self, value: float) -> None:
        self.sum, self.n = self.sum + value, self.n + 1


class Smoothed(nn.Module):
    """A loss with a moving scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = None

    def forward(self, outputs, labels):
        loss = nn.functional.cross_entropy(outputs, labels)
        now = float(loss.detach())
        self.scale = now if self.scale is None else 0.5 * self.scale + 0.5 * now
        return loss / self.scale


class WithTeacher(Trainer):
    """Pulls its model to a mean of it."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.teacher, self.pulls = copy.deepcopy(self.model), 0

    def save_checkpoint(self) -> str:
        self.pulls += 1
        with torch.no_grad():
            for mean, p in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(p, 0.5)
                p.lerp_(mean, 1 / (1 + self.pulls))
        return super().save_checkpoint()


def own(
    folder: str, kill_at: int = 0, forget: bool = False, workers: int = 0, level: int = 0, **config
) -> None:
    """Train with our Trainer."""
    if forget:
        Attributes.restore = lambda *_, **__: None
    torch.manual_seed(0)
    data = Curriculum(level)
    trainer = WithTeacher(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)),
        TrainerConfig(
            output_dir=folder,
            batch_size=2,
            max_steps=STEPS,
            save_steps=1,
            learning_rate=0.01,
            dataloader_num_workers=workers,
            **config,
        ),
        data,
        callbacks=[Raises()],
        loss_fn=Smoothed(),
        display=NoDisplay(),
    )
    trainer.data_set, trainer.kill_at = data, kill_at
    report = trainer.train().resume_report
    follower = trainer.callbacks[0]
    more = [follower.count, follower.meter.n, follower.own_pid == os.getpid(), data.level]
    write(folder, report, seen_in(trainer.model, trainer.teacher, more=more))


class Followed(nn.Linear):
    """A model that each rank follows in its own way: rank 0 alone keeps an average."""

    def __init__(self, rank: int) -> None:
        super().__init__(4, 4)
        self.of_mine, self.average, self.table = 0.0, None, {}
        if rank == 0:
            self.__dict__["average"] = copy.deepcopy(nn.Linear(4, 4))


def on_ranks(folder: str, steps: int) -> None:
    """Train by hand on several ranks, from where a checkpoint is; each tells what it has."""
    torch.manual_seed(0)
    with closing(join()) as group:
        model = Followed(group.rank)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Checkpointer(folder, ranks=group, model=model, optimizer=optimizer) as checkpointer:
            report = checkpointer.resume()
            for step in range(report.step, steps):
                model(torch.ones(4) * step).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                model.of_mine += group.rank + 0.5
                if model.average is not None:
                    torch.nn.utils.vector_to_parameters(
                        torch.full((20,), float(step)), model.average.parameters()
                    )
                model.table["w"] = model.weight.detach().clone() * (1 + group.rank)
                checkpointer.save(step + 1)
        mean = None if model.average is None else model.average.weight.tolist()
        told = [model.of_mine, mean, model.table["w"].tolist(), report.verdict]
        Path(f"{folder}.{group.rank}.json").write_text(json.dumps(told))
