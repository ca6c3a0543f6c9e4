"""Makes the committed run of the present format: python tests/committed_runs/make.py FOLDER.

A run of each version of the format stays in the repository, so that it stays readable. Never make
one again: make that of the next version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from unbroken.training import NoDisplay, Trainer, TrainerConfig


def trainer(folder: Path, **settings) -> Trainer:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.1), nn.Linear(2, 2))
    generator = torch.Generator().manual_seed(7)
    data = [(torch.randn(3, generator=generator), torch.tensor(i % 2)) for i in range(12)]
    config = TrainerConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "batch_size": 4,
            "save_steps": 2,
            "save_at_start": False,
            "logging_steps": 1,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            **settings,
        }
    )
    return Trainer(model, config, data, loss_fn=nn.CrossEntropyLoss(), display=NoDisplay())


def contents(made: Trainer) -> dict:
    """Return all that the next step depends on, as text."""
    state = made.optimizer.state
    moments = {
        name: state[p]["exp_avg"].numpy().tobytes().hex()
        for name, p in made.model.named_parameters()
    }
    weights = {n: t.numpy().tobytes().hex() for n, t in made.model.state_dict().items()}
    return {"step": made.progress.step, "weights": weights, "moments": moments}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    made = trainer(folder / "run", max_steps=4)
    made.train()
    (folder / "contents.json").write_text(json.dumps(contents(made), indent=1) + "\n")
    settings = {"branch": "longer", "resume_from_checkpoint": 2, "max_steps": 3}
    trainer(folder / "run", **settings).train()
