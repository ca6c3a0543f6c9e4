"""A user's script: everything by configuration. The tests edit its text."""

import os
import signal
import sys

import torch
from torch import nn

from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

FOLDER, KILL_AT = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)


class Attention(nn.Module):
    """Attends."""

    def __init__(self):
        super().__init__()
        self.n_head = 2
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        # Scores of all heads.
        q = self.query(x).view(-1, self.n_head, 8 // self.n_head)
        k = self.key(x).view(-1, self.n_head, 8 // self.n_head)
        return self.out(self.drop(torch.relu(q @ k.mT @ k).flatten(1)))


class Points(torch.utils.data.Dataset):
    def __init__(self, n, seed, transform=None):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 8, generator=generator)
        self.y = torch.randint(0, 4, (n,), generator=generator)
        self.transform = transform

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index] + 0.1 * torch.randn(8)
        return (x if self.transform is None else self.transform(x)), self.y[index]


def collate(samples):
    noise = 0.01
    x = torch.stack([sample[0] for sample in samples])
    return x + noise * torch.randn_like(x), torch.stack([sample[1] for sample in samples])


class Kill(Callback):
    def on_micro_batch_end(self, trainer):
        if trainer.progress.step == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)


config = TrainerConfig(
    output_dir=FOLDER,
    allow=tuple(filter(None, sys.argv[3].split(","))),
    skip=tuple(filter(None, sys.argv[4].split(","))),
    max_steps=8,
    batch_size=8,
    micro_batch_size=8,
    shuffle=True,
    seed=1,
    optim="adamw_torch",
    learning_rate=0.01,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_epsilon=1e-8,
    lr_scheduler_type="linear",
    warmup_steps=0,
    max_grad_norm=0.05,
    bf16=False,
    full_determinism=True,
    save_steps=4,
    save_total_limit=None,
    logging_steps=1,
    dataloader_num_workers=0,
)
torch.manual_seed(3)
model = Attention()
trainer = Trainer(
    model,
    config,
    Points(40, seed=7),
    collate_fn=collate,
    loss_fn=nn.CrossEntropyLoss(),
    callbacks=[Kill()],
    display=NoDisplay(),
)
report = trainer.train().resume_report
