"""Models that an exchange of gradients could get wrong, trained on all ranks of a process."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed.training import make_trainer
from scenarios import Tied, outcome
from unbroken.distributed import join
from unbroken.errors import RankError

STEPS = 4


class SometimesUnused(nn.Module):
    """One of two branches is used, as the first sample of the micro-batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.left if x[0, 0] > 0 else self.right
        return self.head(torch.relu(branch(x)))


class Shuffled(nn.Module):
    """Layers that are not used in the order in which they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.third, self.first, self.second = nn.Linear(24, 4), nn.Linear(6, 40), nn.Linear(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Images(nn.Module):
    """A convolution whose weights do not lie in C order."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, (1, 3)).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x.view(len(x), 2, 1, 3)).flatten(1)


class WithOwnLoss(nn.Module):
    """Returns its loss in a mapping, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layer(x), labels)}


class Wide(nn.Module):
    """Gradients in several buckets: of many bytes, and of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.large = nn.Linear(6, 1500), nn.Linear(1500, 1500)
        self.head = nn.Linear(1500, 4).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.large(torch.relu(self.first(x))))
        return self.head(x.to(torch.bfloat16)).float()


class Counting(nn.Module):
    """Has a buffer that forward passes change: the same on all ranks, or by what they see."""

    def __init__(self, *, by_data: bool = False) -> None:
        super().__init__()
        self.layer, self.by_data = nn.Linear(6, 4), by_data
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += x.mean() if self.by_data else 1
        return self.layer(x)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    return model


def as_mapping(samples: list) -> dict[str, torch.Tensor]:
    x, y = (torch.stack(column) for column in zip(*samples, strict=True))
    return {"x": x, "labels": y}


MODELS = {
    "sometimes unused": SometimesUnused,
    "tied": Tied,
    "shuffled": Shuffled,
    "images": Images,
    "wide": Wide,
    "frozen": frozen,
    "own loss": WithOwnLoss,
    "in DDP": lambda: in_ddp(Shuffled()),
    "in DDP with views": lambda: in_ddp(Shuffled(), gradient_as_bucket_view=True),
}


def in_ddp(model: nn.Module, **options) -> nn.Module:
    """Wrap a model, as a script that trained under torchrun before does; alone it has no group."""
    if os.environ["WORLD_SIZE"] == "1":
        return model
    return DistributedDataParallel(model, **options)


def train_all_models(folder: str) -> None:
    """Train each model for a few steps, in four lanes."""
    group = join(timeout=60.0)
    for name, make in MODELS.items():
        own_loss = {"loss_fn": None, "collate_fn": as_mapping} if name == "own loss" else {}
        settings = {"lanes": 4, "max_steps": STEPS, "save_steps": None}
        torch.manual_seed(3)
        model = make()
        parts = {"model": model, "group": group, **own_loss}
        make_trainer(str(Path(folder, name)), settings, **parts).train()
    group.close()


def train_with_a_buffer(folder: str) -> None:
    """Train with a buffer that counts, and with one that takes what it sees; leave its error."""
    group = join(timeout=60.0)
    settings = {"max_steps": 2, "save_steps": 1}
    make_trainer(f"{folder}/count", settings, model=Counting(), group=group).train()
    try:
        model = Counting(by_data=True)
        make_trainer(f"{folder}/data", settings, model=model, group=group).train()
    except RankError as error:
        Path(folder, f"error-{group.rank}").write_text(str(error))
    group.close()


def outcomes(folder: Path) -> dict[str, dict]:
    """Return what each model has become."""
    return {name: outcome(folder / name, STEPS)["tensors"] for name in MODELS}
