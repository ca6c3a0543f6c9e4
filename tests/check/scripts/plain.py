"""A hand-written training loop that resumes exactly; `--bug NAME` breaks it in one way.

    python plain.py --out FOLDER [--bug NAME] [--batch-size 4]

It has all that can be forgotten: dropout, BatchNorm, AdamW, a schedule, a gradient scaler, an
average of the weights, shuffling by epoch, random augmentation, accumulation of two micro-batches.
"""

import argparse
import copy
import os
from pathlib import Path

import torch
from torch import nn

SAMPLES, EPOCHS, ACCUMULATE, SAVE_STEPS = 48, 3, 2, 4

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--bug", default="")
parser.add_argument("--batch-size", type=int, default=4)
arguments = parser.parse_args()
BUG, BATCH = arguments.bug, arguments.batch_size
CHECKPOINT = arguments.out / "checkpoint.pt"


class Noisy(torch.utils.data.Dataset):
    """Samples with fresh noise each time, from a generator of its own."""

    def __init__(self):
        source = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, 8, generator=source)
        self.noise = torch.Generator().manual_seed(2)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x = self.x[index] + 0.1 * torch.randn(8, generator=self.noise)
        return x if BUG != "nondeterministic" else x + 1e-3 * (os.urandom(1)[0] % 7)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1)
        )
        self.seen = 0  # neither parameter nor buffer

    def forward(self, x):
        self.seen += 1
        return self.layers(x).square().mean() * (1 + 0.01 * self.seen)


if BUG != "seeds only at the first start" or not CHECKPOINT.exists():
    torch.manual_seed(0)
model = Net()
average = copy.deepcopy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
data = Noisy()
step, first_epoch, position = 0, 0, 0  # the position counts micro-batches in the epoch
first_weights = copy.deepcopy(model.state_dict())


def save():
    weights = first_weights if BUG == "stale save" else model.state_dict()
    state = {
        "model": weights,
        "seen": model.seen,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "average": average.state_dict(),
        "noise": data.noise.get_state(),
        "torch": torch.get_rng_state(),
        "progress": [step, epoch, position],
        "gradients": [p.grad for p in model.parameters()],
    }
    torch.save(state, CHECKPOINT.with_suffix(".new"))
    os.replace(CHECKPOINT.with_suffix(".new"), CHECKPOINT)


def load():
    """Restore all but what the bug forgets; then do what else the bug does."""
    state = torch.load(CHECKPOINT)
    restore = {
        "the weights": lambda: model.load_state_dict(state["model"]),
        "the optimizer": lambda: optimizer.load_state_dict(state["optimizer"]),
        "the scheduler": lambda: scheduler.load_state_dict(state["scheduler"]),
        "the scaler": lambda: scaler.load_state_dict(state["scaler"]),
        "the average": lambda: average.load_state_dict(state["average"]),
        "the augmentation": lambda: data.noise.set_state(state["noise"]),
        "a counter of the model": lambda: setattr(model, "seen", state["seen"]),
        "pending gradients": lambda: set_gradients(state["gradients"]),
    }
    for what, do in restore.items():
        if f"forgets {what}" != BUG:
            without = WITHOUT.get(BUG)
            load_weights_without(without, state) if without and what == "the weights" else do()
    if "seeds" not in BUG:
        torch.set_rng_state(state["torch"])
    if BUG == "another weight decay":
        optimizer.param_groups[0]["weight_decay"] = 0.1
    if BUG == "fails":
        raise SystemExit("cannot read the checkpoint")
    step, epoch, position = state["progress"]
    places = {
        "forgets the position": (epoch, 0),
        "skips to the next epoch": (epoch + 1, 0),
        "counts what was read ahead": (epoch, position + 2 * ACCUMULATE),
        "counts one step too few": (epoch, position - ACCUMULATE),
        # though the size of a batch may have changed
        "counts in steps": divmod(step * ACCUMULATE, SAMPLES // BATCH),
        "is done at once": (EPOCHS, 0),
    }
    return step, *places.get(BUG, (epoch, position))


WITHOUT = {"forgets the running statistics": "running", "forgets one layer": "layers.3"}


def load_weights_without(part, state):
    kept = {name: value for name, value in state["model"].items() if part not in name}
    model.load_state_dict(kept, strict=False)


def set_gradients(gradients):
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


def order_of(number):
    is_forgotten = BUG == "forgets the sampler's epoch" and CHECKPOINT.exists() and number < 2
    seed = 100 if is_forgotten else 100 + number
    if BUG == "shuffles anew" and CHECKPOINT.exists() and number < 2:
        seed = 999
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed)).tolist()


if CHECKPOINT.exists() and BUG != "ignores the checkpoint":
    step, first_epoch, position = load()
save_steps = 1000 if BUG == "never saves" else SAVE_STEPS
last = 2 if BUG == "stops too early" and CHECKPOINT.exists() else EPOCHS
for epoch in range(first_epoch, last):
    batches = torch.tensor(order_of(epoch)).split(BATCH)[position:]
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=[batch.tolist() for batch in batches], generator=torch.Generator()
    )
    for batch in loader:
        position += 1
        scaler.scale(model(batch) / ACCUMULATE).backward()
        if BUG == "forgets pending gradients" and step % SAVE_STEPS == 0 and position % 2 and step:
            save()  # inside the window
        if position % ACCUMULATE:
            continue
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        for kept, new in zip(average.parameters(), model.parameters(), strict=True):
            kept.data.lerp_(new.data, 0.1)
        if step == 1:
            first_weights = copy.deepcopy(model.state_dict())
        if step % save_steps == 0 and BUG != "forgets pending gradients":
            save()
    position = 0
print("done", step)
