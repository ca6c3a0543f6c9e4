"""Our own Trainer, with dropout, shuffling, workers and accumulation.

python ours.py --out FOLDER [--bug NAME]
"""

import argparse

import torch

from unbroken import Trainer, TrainerConfig

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True)
parser.add_argument("--bug", default="")
arguments = parser.parse_args()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 2))
source = torch.Generator().manual_seed(1)
data = [(torch.randn(8, generator=source), torch.tensor(i % 2)) for i in range(48)]
config = TrainerConfig(
    output_dir=f"{arguments.out}/run",
    batch_size=8,
    micro_batch_size=4,
    max_steps=12,
    learning_rate=1e-2,
    save_steps=4,
    seed=0,
    resume_from_checkpoint="never" if arguments.bug == "never resumes" else "auto",
)
Trainer(model, config, data, loss_fn=torch.nn.CrossEntropyLoss()).train()
