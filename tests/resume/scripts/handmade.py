"""A user's script: optimizer and schedule made by hand. The tests edit its text."""

import os
import signal
import sys

import torch
from torch import nn

from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

FOLDER, KILL_AT = sys.argv[1], int(sys.argv[2])
PEAK = 0.9
torch.set_num_threads(1)


def warmed_up(warmup):
    return lambda step: min(1.0, (step + 1) / warmup) * PEAK


class Kill(Callback):
    def on_micro_batch_end(self, trainer):
        if trainer.progress.step == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(3)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
decayed = [model[0].weight, model[2].weight]
others = [model[0].bias, model[2].bias]
groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), foreach=False)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmed_up(4))
config = TrainerConfig(
    output_dir=FOLDER,
    allow=tuple(filter(None, sys.argv[3].split(","))),
    skip=tuple(filter(None, sys.argv[4].split(","))),
    max_steps=8,
    save_steps=4,
    logging_steps=1,
)
x = torch.randn(40, 8, generator=torch.Generator().manual_seed(7))
trainer = Trainer(
    model,
    config,
    [(row, row.argmax() % 4) for row in x],
    optimizer=optimizer,
    scheduler=scheduler,
    loss_fn=nn.CrossEntropyLoss(),
    callbacks=[Kill()],
    display=NoDisplay(),
)
report = trainer.train().resume_report
