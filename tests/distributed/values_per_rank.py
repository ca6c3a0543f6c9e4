"""Loops in which a value says which rank it is, and ranks that do not train alike."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distributed.training import make_trainer
from unbroken.checkpoint import Checkpointer, RunFacts
from unbroken.distributed import Group, join
from unbroken.errors import UnbrokenError
from unbroken.fingerprint import COMPILED
from unbroken.training import Callback, Trainer

STEPS = 4
RANK = 0  # set by each rank, as a script does


class OfARank(nn.Module):
    """Knows its rank, and uses a global that tells it, too."""

    def __init__(self, rank: int, hidden: int = 8) -> None:
        super().__init__()
        self.layer, self.rank, self.dropout = nn.Linear(6, 4), rank, nn.Dropout(hidden / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer(x)) + 0 * (self.rank - RANK)


def loss_of_a_rank(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output.mean(), target.float().mean() + RANK)


class Numbers:
    """A data set that knows its rank, or has other records on one."""

    def __init__(self, rank: int | None, offset: int = 0) -> None:
        self.rows = torch.arange(40.0) + offset
        if rank is not None:
            self.rank = rank

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = getattr(self, "rank", 0)
        return (self.rows[index] + own).expand(6), torch.tensor(index % 4)


class Others:
    """The same records as another class has: other code."""

    __len__ = Numbers.__len__

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((6,), float(index)), torch.tensor(index % 4)


def train_with_values(folder: str, last: int) -> None:
    """Train a loop, and a Trainer, whose parts know their rank; leave what was told."""
    global RANK
    group = join(timeout=60.0)
    RANK = group.rank
    told = {"loop": loop(f"{folder}/loop", group, last), "trainer": trainer(folder, group, last)}
    Path(folder, f"told-{group.rank}").write_text(json.dumps(told))
    with contextlib.suppress(RuntimeError):  # another rank may be dead already
        dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def loop(folder: str, group: Group, last: int) -> list[str]:
    torch.manual_seed(3)
    model = OfARank(group.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"rank": group.rank, "seed": 100 + group.rank}
    facts = {"loss": {"values": {"RANK": RANK}}}
    more: dict[str, Any] = {"settings": RunFacts(settings, lambda: facts)}
    objects = {"model": model, "optimizer": optimizer}
    with Checkpointer(folder, ranks=group, **more, **objects) as checkpointer:
        report = checkpointer.resume()
        checkpointer.save(last)
    return report.lines() if report.resumed else []


def trainer(folder: str, group: Group, last: int) -> list[str]:
    torch.manual_seed(3)
    settings = {"max_steps": last, "save_steps": 1, "batch_size": 4}
    settings["lr_scheduler_type"] = "constant"
    parts = {"train_dataset": Numbers(group.rank), "loss_fn": loss_of_a_rank, "group": group}
    one = make_trainer(f"{folder}/trainer", settings, model=OfARank(group.rank), **parts)
    one.train()
    report = one.resume_report
    return report.lines() if report.resumed else []


class Fading(Callback):
    """Lowers a factor of the loss, on each rank in its own way."""

    def __init__(self) -> None:
        self.factor = 1.0

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.factor * nn.functional.cross_entropy(output, target)

    def on_step_end(self, trainer: Trainer) -> None:
        self.factor *= 0.9 - 0.2 * trainer.group.rank

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.factor = state["factor"]


class Registered(Fading):
    """The same, given as a state of the run, and stepped by a callback without one."""


class Steps(Callback):
    def __init__(self, fading: Fading) -> None:
        self.on_step_end = fading.on_step_end


def train_with_followers(folder: str, last: int, lanes: int | None = None) -> None:
    """Train with a callback, and with an object of the state, that rank for rank differ."""
    group, told = join(timeout=60.0), {}
    settings = {"max_steps": last, "save_steps": 2, "lr_scheduler_type": "constant"}
    settings |= {} if lanes is None else {"lanes": lanes}
    for kind, own in {"callback": Fading(), "state": Registered()}.items():
        is_state = kind == "state"
        parts = {"loss_fn": own.loss, "group": group, "callbacks": [own]}
        parts |= {"state": {"own": own}, "callbacks": [Steps(own)]} if is_state else {}
        trainer = make_trainer(f"{folder}/{kind}", settings, **parts)
        trainer.train()
        weights = [p.tolist() for p in trainer.model.parameters()]
        told[kind] = [own.factor, weights, trainer.resume_report.lines()]
    Path(folder, f"told-{group.rank}").write_text(json.dumps(told))
    with contextlib.suppress(RuntimeError):  # another rank may be dead already
        dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def other_layers(folder: str, group: Group) -> None:
    model = OfARank(0, hidden=8 + group.rank)
    Checkpointer(folder, ranks=group, model=model).resume()


def other_hyperparameters(folder: str, group: Group) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.1 * group.rank)
    Checkpointer(folder, ranks=group, model=model, optimizer=optimizer).resume()


def other_script(folder: str, group: Group) -> None:
    code = {"script": "train.py", "script_digest": "abc" if group.rank == 0 else "def"}
    checkpointer = Checkpointer(folder, ranks=group, model=nn.Linear(2, 2))
    checkpointer.comparison.record_current_facts()
    checkpointer.comparison.facts["fingerprint"]["code"].update(code)
    checkpointer.resume()


def other_module(folder: str, group: Group) -> None:
    """Begin where rank 1 has another file of a module, and each loads one that is its own."""
    checkpointer = Checkpointer(folder, ranks=group, model=nn.Linear(2, 2))
    checkpointer.comparison.record_current_facts()
    modules = {"helpers": "abc" if group.rank == 0 else "def", f"of_{group.rank}": "1"}
    modules["kernels"] = f"{COMPILED}{group.rank}"  # each machine may have compiled it
    checkpointer.comparison.facts["fingerprint"]["code"].update(modules=modules)
    checkpointer.resume()


def other_records(folder: str, group: Group) -> None:
    trainer_on(folder, group, Numbers(None, offset=group.rank))


def other_class(folder: str, group: Group) -> None:
    trainer_on(folder, group, Numbers(None) if group.rank == 0 else Others())


def trainer_on(folder: str, group: Group, data: Any) -> None:
    torch.manual_seed(3)
    settings = {"max_steps": 2, "save_steps": 1, "batch_size": 4}
    make_trainer(folder, settings, train_dataset=data, group=group).train()


OTHERS: MappingProxyType[str, tuple[Callable[[str, Group], None], str]] = MappingProxyType(
    {
        "layers": (other_layers, "rank 1: model.layer.dropout"),
        "hyperparameters": (other_hyperparameters, "rank 1: optimizer."),
        "script": (other_script, "rank 1: code.script_digest: expected"),
        "modules": (other_module, "rank 1: code.modules.helpers: expected"),
        "records": (other_records, "rank 1: data.records"),
        "class of data": (other_class, "rank 1: data.class"),
    }
)


def begin_all(folder: str) -> None:
    """Begin with ranks that do not train alike; leave what each says."""
    group, told = join(timeout=60.0), {}
    for number, (name, (begin, _)) in enumerate(OTHERS.items()):
        try:
            begin(f"{folder}/{number}", group)
            told[name] = ""
        except UnbrokenError as error:
            told[name] = f"{type(error).__name__}: {error}"
    Path(folder, f"told-{group.rank}").write_text(json.dumps(told))
    os._exit(0)
