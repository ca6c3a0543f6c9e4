"""What is exported of a live model is all of it, ties included."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from unbroken.checkpoint import Checkpointer
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader
from unbroken.store.export import export_weights


class TwoTies(nn.Module):
    """Two weights under two names each, one of them between two that stand alone."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.first, self.alone, self.second = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.head, self.third = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head.bias = self.third.bias
        self.register_buffer("table", torch.rand(3))


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
def test_of_tied_weights_one_is_exported_and_brings_back_both(is_frozen, tmp_path):
    model = TwoTies(1).requires_grad_(not is_frozen)
    with Checkpointer(tmp_path / "run", model=model) as checkpointer:
        checkpointer.save(1)
    reader = CheckpointReader(LocalStorage(tmp_path / "run"), "checkpoint-1")
    export_weights(reader, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    names = {name for name, _ in model.named_parameters()} | {"table"}
    assert set(found) == names
    assert len(names) == len(model.state_dict()) - 2
    again = TwoTies(2)
    again.load_state_dict(found, strict=False)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
