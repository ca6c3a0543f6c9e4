"""torch.save, and safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peers.method import Method


class TorchSave(Method):
    def write(self, path: Path) -> None:
        torch.save(self.state(), path)

    def load(self, number: int) -> None:
        state = torch.load(self.path(number), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Safetensors(Method):
    """Tensors alone: neither hyperparameters nor anything else is saved."""

    def write(self, path: Path) -> None:
        path.mkdir()
        weights = {name: one.detach() for name, one in self.model.named_parameters()}
        save_file(weights, path / "model.safetensors")
        save_file(dict(self._moments()), path / "optimizer.safetensors")

    def _moments(self):
        for number, state in self.optimizer.state_dict()["state"].items():
            for key, tensor in state.items():
                yield f"{number}.{key}", tensor

    def load(self, number: int) -> None:
        path = self.path(number)
        weights = {name: one.detach() for name, one in self.model.named_parameters()}
        fill(weights, path / "model.safetensors")
        fill(dict(self._moments()), path / "optimizer.safetensors")


def fill(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copy each tensor of a file into its place."""
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))
