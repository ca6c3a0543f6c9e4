"""A loop with Accelerate's save_state and load_state, as its documentation shows.

python accelerate_loop.py --out FOLDER [--bug NAME]
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

EPOCHS, PER_EPOCH = 3, 6

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--bug", default="")
arguments = parser.parse_args()

accelerator = Accelerator(cpu=True)
set_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=18)
samples = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
save_steps = 4 if arguments.bug == "mid-epoch" else PER_EPOCH
step = 0
saved = sorted(arguments.out.glob("step-*"))
if saved:
    if arguments.bug != "forgets to load":
        accelerator.load_state(str(saved[-1]))
    step = int(saved[-1].name.removeprefix("step-"))
first_epoch, skipped = divmod(step, PER_EPOCH)
for epoch in range(first_epoch, EPOCHS):
    skip = skipped if epoch == first_epoch else 0
    for batch in accelerator.skip_first_batches(loader, skip) if skip else loader:
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % save_steps == 0:
            accelerator.save_state(str(arguments.out / f"step-{step:02}"))
