"""Two gloo ranks, DDP, one generator for each rank; `--bug NAME` breaks it in one way.

torchrun --nproc-per-node 2 two_ranks.py --out FOLDER [--bug NAME]
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

STEPS, SAVE_STEPS = 10, 3

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--bug", default="")
arguments = parser.parse_args()

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 1))
model = nn.parallel.DistributedDataParallel(layers)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
samples = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
torch.manual_seed(100 + rank)
first = 0


def path_of(number):
    return arguments.out / f"rank{number}.pt"


if path_of(rank).exists():
    state = torch.load(path_of(rank))
    first = state["step"]
    layers.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    of_rank = 0 if arguments.bug == "the generator of rank 0" else rank
    torch.set_rng_state(torch.load(path_of(of_rank))["torch"])
dist.barrier()
for step in range(first, STEPS):
    batch = samples[(step * 2 + rank) * 3 :][:3]
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % SAVE_STEPS == 0:
        state = {
            "step": step + 1,
            "model": layers.state_dict(),
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
        }
        torch.save(state, path_of(rank).with_suffix(".new"))
        dist.barrier()
        os.replace(path_of(rank).with_suffix(".new"), path_of(rank))
        dist.barrier()
# The interpreter is not taken down: a thread of gloo that still frees a tensor of DDP then aborts
# the process (pytorch/pytorch#179291), now and then on a busy machine.
os._exit(0)
