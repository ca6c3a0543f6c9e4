"""Accelerate's save_state and load_state: python accelerate_script.py --out DIR --case NAME."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

EPOCHS, PER_EPOCH = 3, 8

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--case", default="")
given = parser.parse_args()
CASE = given.case

seedable = DataLoaderConfiguration(use_seedable_sampler="seedable" in CASE)
accelerator = Accelerator(cpu=True, dataloader_config=seedable)
set_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=24)
samples = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle="no shuffling" not in CASE)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
save_steps = PER_EPOCH if "epoch end" in CASE else 5
step = 0
saved = sorted(given.out.glob("step-*"))
if saved:
    accelerator.load_state(str(saved[-1]))
    step = int(saved[-1].name.removeprefix("step-"))
first_epoch, skipped = divmod(step, PER_EPOCH)
for epoch in range(first_epoch, EPOCHS):
    skip = skipped if epoch == first_epoch else 0
    for batch in accelerator.skip_first_batches(loader, skip) if skip else loader:
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % save_steps == 0:
            accelerator.save_state(str(given.out / f"step-{step:02}"))
