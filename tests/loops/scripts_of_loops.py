"""Small loops as functions, for tests in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from unbroken import Checkpointer


class Noisy(torch.utils.data.Dataset):
    """Samples that are drawn anew each time they are read."""

    def __init__(self, count: int = 22) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index)) + torch.randn(4) / 8


class Run:
    """A model, its optimizer and a Checkpointer; `train` takes a step."""

    def __init__(self, folder: Any, **more: Any) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.told: list[str] = []
        parts = {"model": self.model, "optimizer": self.optimizer, **more}
        self.run = Checkpointer(folder, tell=self.told.append, **parts)

    def train(self, *batches: torch.Tensor) -> None:
        for batch in batches:
            self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def bits(self) -> list[Any]:
        weights = [one.detach().clone() for one in self.model.state_dict().values()]
        moments = [one["exp_avg"].clone() for one in self.optimizer.state.values()]
        return [one.tolist() for one in (*weights, *moments, torch.get_rng_state())]


class LeftError(Exception):
    """The loop is left here."""
