"""A loop that edits its weights after each step, and tries its model out at each start.

python edits.py --out FOLDER [--bug NAME]
"""

import argparse
import os
from pathlib import Path

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--bug", default="")
arguments = parser.parse_args()
CHECKPOINT = arguments.out / "checkpoint.pt"

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
samples = torch.randn(64, 8)
model(torch.zeros(1, 8))  # does it run at all?
first = 0


def clamp():
    for weights in model.parameters():
        weights.data.clamp_(-0.2, 0.2)


def save(step):
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, CHECKPOINT.with_suffix(".new"))
    os.replace(CHECKPOINT.with_suffix(".new"), CHECKPOINT)


if CHECKPOINT.exists():
    state = torch.load(CHECKPOINT)
    first = state["step"]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
for step in range(first, 12):
    model(samples[step * 4 :][:4]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if arguments.bug == "saves before it clamps" and step % 4 == 3:
        save(step + 1)
    clamp()
    if not arguments.bug and step % 4 == 3:
        save(step + 1)
