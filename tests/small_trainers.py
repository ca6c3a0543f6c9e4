"""A small run in this process, for tests of what a Trainer does rather than of bits."""

from __future__ import annotations

import torch
from torch import nn

from unbroken.training import NoDisplay, Trainer, TrainerConfig

PAIRS = [
    (x, y)
    for x, y in zip(
        torch.randn(40, 6, generator=torch.Generator().manual_seed(1)),
        torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(2)),
        strict=True,
    )
]


def small_model(width: int = 8) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, width), nn.Dropout(0.2), nn.Linear(width, 4))


def small_trainer(
    folder, *, model=None, dataset=PAIRS, trainer=None, any_length=True, **settings
) -> Trainer:
    """Return a Trainer; that a run gets longer is meant, unless `any_length` is False."""
    if any_length:
        settings["allow"] = ["max_steps", "num_train_epochs", *settings.get("allow", ())]
    settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, **settings}
    return Trainer(
        small_model() if model is None else model,
        TrainerConfig(output_dir=str(folder), **{"learning_rate": 0.01, **settings}),
        dataset,
        loss_fn=nn.CrossEntropyLoss(),
        display=NoDisplay(),
        **(trainer or {}),
    )


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def steps_in(folder) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
