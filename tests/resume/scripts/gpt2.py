"""A user's script: a GPT-2 of transformers. The tests edit its text."""

import os
import signal
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

FOLDER, KILL_AT = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)


class Kill(Callback):
    def on_micro_batch_end(self, trainer):
        if trainer.progress.step == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(3)
shape = GPT2Config(
    n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8, resid_pdrop=0.1,
    bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
)  # fmt: skip
model = GPT2LMHeadModel(shape)
config = TrainerConfig(
    output_dir=FOLDER,
    allow=tuple(filter(None, sys.argv[3].split(","))),
    skip=tuple(filter(None, sys.argv[4].split(","))),
    num_train_epochs=2,
    batch_size=8,
    lr_scheduler_type="constant",
    save_steps=4,
    logging_steps=1,
)
tokens = torch.randint(0, 32, (32, 8), generator=torch.Generator().manual_seed(7))
data = [{"input_ids": row, "labels": row} for row in tokens]
trainer = Trainer(model, config, data, callbacks=[Kill()], display=NoDisplay())
report = trainer.train().resume_report
