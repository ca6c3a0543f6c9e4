"""A loop in nanoGPT's style: no data loader, random crops of one text, settings by hand.

python random_crops.py --out FOLDER [--bug NAME]
"""

import argparse
import os
from pathlib import Path

import torch

STEPS, SAVE_STEPS = 12, 4

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--bug", default="")
arguments = parser.parse_args()
checkpoint = arguments.out / "ckpt.pt"

if arguments.bug != "seeds only at the first start" or not checkpoint.exists():
    torch.manual_seed(1337)
text = torch.randint(0, 32, (512,), generator=torch.Generator().manual_seed(1))
model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def get_batch():
    begins = torch.randint(len(text) - 9, (4,)).tolist()
    return torch.stack([text[begin : begin + 9] for begin in begins])


first = 0
if checkpoint.exists():
    state = torch.load(checkpoint)
    first = state["step"]
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if "seeds" not in arguments.bug:
        torch.set_rng_state(state["torch"])
for step in range(first, STEPS):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * (1 - step / STEPS)
    batch = get_batch()
    logits = model(batch[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if (step + 1) % SAVE_STEPS == 0:
        state = {
            "step": step + 1,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)
