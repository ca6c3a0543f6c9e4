"""A user's script: a loop written by hand around a Checkpointer. The tests edit its text."""

import os
import signal
import sys

import torch
from torch import nn

from unbroken.checkpoint import Checkpointer, ResumePolicy

FOLDER, KILL_AT = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
allow = tuple(filter(None, sys.argv[3].split(",")))
skip = tuple(filter(None, sys.argv[4].split(",")))
checkpointer = Checkpointer(
    FOLDER,
    save_steps=4,
    settings={"data": {"noise": 0.5}},
    resume=ResumePolicy(allow, skip),
    model=model,
    optimizer=optimizer,
    scheduler=scheduler,
)
report = checkpointer.resume()
for step in range(report.step + 1, 9):
    loss = nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.zeros(4, dtype=torch.long))
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step == KILL_AT + 1:
        os.kill(os.getpid(), signal.SIGKILL)
    checkpointer.save_if_due(step)
checkpointer.close()
