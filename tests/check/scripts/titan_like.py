"""A loop in torchtitan's style: infinite loader with a state, stateful objects, DCP.

python titan_like.py --out FOLDER [--bug NAME]
"""

import argparse
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

STEPS, INTERVAL = 12, 4

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--bug", default="")
arguments = parser.parse_args()
BUG = arguments.bug
warnings.filterwarnings("ignore", module="torch.distributed")


class Tokens(torch.utils.data.IterableDataset):
    """An endless stream with a position."""

    def __init__(self):
        self.text = torch.randint(0, 32, (512,), generator=torch.Generator().manual_seed(1))
        self.begin = 0

    def __iter__(self):
        position = self.begin
        while True:
            yield self.text[position % 500 :][:9].clone()
            position += 8


class Loader:
    """The stream in batches, with state_dict and load_state_dict."""

    def __init__(self):
        self.dataset = Tokens()

    used = 0

    def __iter__(self):
        self.dataset.begin = self.used * 8
        for batch in torch.utils.data.DataLoader(self.dataset, batch_size=4, num_workers=1):
            self.used += len(batch)
            yield batch

    def state_dict(self):
        return {"used": self.used}

    def load_state_dict(self, state):
        self.used = state["used"]


class TrainState:
    step = 0

    def state_dict(self):
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state):
        self.step = int(state["step"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.output = nn.Linear(16, 32)

    def forward(self, tokens):
        return self.output(self.embedding(tokens))


class ModelState:
    def __init__(self, model):
        self.model = model

    def state_dict(self):
        return get_model_state_dict(self.model)

    def load_state_dict(self, state):
        set_model_state_dict(self.model, state)


class OptimizerState:
    def __init__(self, model, optimizer):
        self.parts = model, optimizer

    def state_dict(self):
        return get_optimizer_state_dict(*self.parts)

    def load_state_dict(self, state):
        set_optimizer_state_dict(*self.parts, state)


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.1, 1 - step / STEPS))
loader, progress = Loader(), TrainState()
states = {
    "model": ModelState(model),
    "optimizer": OptimizerState(model, optimizer),
    "scheduler": scheduler,
    "loader": loader,
    "progress": progress,
}
batches = iter(loader) if BUG == "iter() before load_state_dict" else None
first = next(batches) if batches is not None else None  # its worker now has a position of its own
saved = sorted(arguments.out.glob("step-*"))
if saved:
    left_out = "optimizer" if BUG == "excludes the optimizer" else ""
    wanted = {name: state for name, state in states.items() if name != left_out}
    dcp.load(wanted, checkpoint_id=str(saved[-1]))
if batches is None:
    batches = iter(loader)
while progress.step < STEPS:
    batch = first if first is not None else next(batches)
    first = None
    optimizer.zero_grad()
    prediction = model(batch[:, :-1])
    loss = nn.functional.cross_entropy(prediction.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    progress.step += 1
    if progress.step % INTERVAL == 0:
        dcp.save(states, checkpoint_id=str(arguments.out / f"step-{progress.step:02}"))
