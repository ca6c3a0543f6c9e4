"""Training scripts with one bug of resuming each, and their repaired twins.

A script is a loop over epochs whose parts are named. A bug is what one or a few of these parts are
in the broken script and in its twin; other parts may belong to both. The kinds of bugs are those
that public issue trackers tell of.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from unbroken.check import Culprit

SKELETON = """
import copy
import itertools
import math
import random
import sys
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

FOLDER = Path(sys.argv[2])  # --out FOLDER
CHECKPOINT = FOLDER / "checkpoint.pt"
IS_RESUMED = CHECKPOINT.exists()
{constants}
torch.manual_seed(0)
random.seed(0)
np.random.seed(0)
{data}
{model}
{optimizer}
{setup}
step, first_epoch, position = 0, 0, 0  # the position counts batches of the epoch


def save(step, epoch, position):
    state = {{
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "progress": (step, epoch, position),
    }}
{save}
    torch.save(state, CHECKPOINT)


if IS_RESUMED:
    state = torch.load(CHECKPOINT, weights_only=False)
{load}
{resumed}
for epoch in range(first_epoch, EPOCHS):
{epoch}
    for place, batch in {batches}:
{train}
        step += 1
{after}
        if step % 4 == 0:
{due}
    position = 0
{end}
print("done", step)
"""

PARTS = {
    "constants": "EPOCHS = 3",
    "data": """
class Samples(Dataset):
    def __init__(self):
        self.x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]


data = Samples()
""",
    "model": "model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 1))",
    "optimizer": "optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)",
    "setup": "",
    "save": "",
    "load": """
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
torch.set_rng_state(state["torch"])
step, first_epoch, position = state["progress"]
""",
    "resumed": "",
    "epoch": """
order = torch.Generator().manual_seed(100 + epoch)
loader = DataLoader(data, batch_size=4, shuffle=True, generator=order)
""",
    "batches": "itertools.islice(enumerate(loader), position, None)",
    "train": """
loss = model(batch).square().mean()
loss.backward()
optimizer.step()
optimizer.zero_grad()
""",
    "after": "",
    "due": "save(step, epoch, place + 1)",
    "end": "",
}
INDENT = {"save": 1, "load": 1, "epoch": 1, "train": 2, "after": 2, "due": 3, "end": 1}

Parts = Mapping[str, str]


@dataclass(frozen=True)
class Bug:
    """A bug of a script that resumes by itself.

    Attributes:
        name: What the script is called.
        what: The bug, in a sentence.
        culprit: What the check shall name; where two words are right, both.
        broken: Parts of the broken script.
        repaired: The same parts of its twin.
        both: Parts of both.
        kill_after: The step after which it is killed.
    """

    name: str
    what: str
    culprit: Culprit | tuple[Culprit, ...]
    broken: Parts
    repaired: Parts
    both: Parts = field(default_factory=dict)
    kill_after: int = 18

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        """What the check may name."""
        return self.culprit if isinstance(self.culprit, tuple) else (self.culprit,)

    def script(self) -> str:
        """Return the text of the broken script."""
        return _script({**self.both, **self.broken})

    def twin(self) -> str:
        """Return the text of the repaired script."""
        return _script({**self.both, **self.repaired})


def and_load(*lines: str) -> str:
    """Return the usual loading, and these lines."""
    return "\n".join((PARTS["load"].strip(), *lines))


def with_scheduler(make: str, **more: str) -> dict[str, str]:
    """Return the parts of a script with a schedule that is stepped and saved."""
    return {
        "optimizer": f"{PARTS['optimizer']}\n{make}",
        "save": 'state["scheduler"] = scheduler.state_dict()',
        "after": "scheduler.step()",
        **more,
    }


def _script(parts: Parts) -> str:
    unknown = parts.keys() - PARTS.keys()
    if unknown:
        raise ValueError(f"no such part: {', '.join(sorted(unknown))}")
    texts = {name: parts.get(name, text).strip("\n") for name, text in PARTS.items()}
    placed = {
        name: textwrap.indent(text, "    " * INDENT.get(name, 0)) for name, text in texts.items()
    }
    lines = SKELETON.format(**placed).strip("\n").split("\n")
    return "\n".join(line for line in lines if line.strip() or not line) + "\n"
