"""Models, losses and callbacks with something of their own that a pass changes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.utils.checkpoint import checkpoint

from small_trainers import PAIRS
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig


class Layers(nn.Module):
    """Two layers, and between them what a subclass does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.build()

    def build(self):
        pass

    def between(self, x):
        return x

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Statistics(Layers):
    def build(self):
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.2)

    def between(self, x):
        return self.drop(self.norm(x))


class Counting(Layers):
    """Counts in a number, a list, a dict, an array and a tensor that is no buffer."""

    def build(self):
        self.calls, self.seen, self.by_size = 0, [], {}
        self.array, self.tensor = np.zeros(2), torch.zeros(2)

    def between(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.by_size[len(x)] = self.by_size.get(len(x), 0) + 1
        self.array[1] += 1
        self.tensor[0] += 1
        return x + 1e-3 * (self.calls + len(self.seen) + self.array[1] + self.tensor[0])


class Lazy(Layers):
    """Makes a buffer and a module when it is first called."""

    def between(self, x):
        if not hasattr(self, "noise"):
            self.register_buffer("noise", torch.randn(8))
            self.activation = nn.GELU()
        return self.activation(x) + self.noise


class Growing(Layers):
    def build(self):
        self.register_buffer("table", torch.zeros(1))

    def between(self, x):
        self.table.resize_(self.table.numel() + 1)[-1] = float(x.detach().mean())
        return x + self.table.sum()


class Expanded(Layers):
    """Has a buffer whose elements lie in one place in memory."""

    def build(self):
        self.register_buffer("positions", torch.ones(1).expand(8))

    def between(self, x):
        return x + self.positions


class Generators(Layers):
    def build(self):
        self.torchs = torch.Generator().manual_seed(1)
        self.numpys, self.pythons = np.random.default_rng(2), random.Random(3)

    def between(self, x):
        noise = self.pythons.random() + self.numpys.normal() + random.random() + np.random.rand()
        return x + noise + torch.rand(8, generator=self.torchs) + torch.rand(8)


class Spectral(Layers):
    def build(self):
        self.last = parametrizations.spectral_norm(self.last)
        self.first = hooked_spectral_norm(self.first)


class Checkpointed(Layers):
    def build(self):
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())

    def between(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


class InPlace(Layers):
    """Changes its input, and activations, where they are."""

    def build(self):
        self.relu = nn.ReLU(inplace=True)

    def between(self, x):
        return self.relu(x)

    def forward(self, x):
        return super().forward(x.mul_(0.5))


class Recurrent(Layers):
    def build(self):
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def between(self, x):
        return self.rnn(x[:, None])[0][:, 0]


class Frozen(Layers):
    """Evaluates a part that has a faster kernel where no hook is on it."""

    def build(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.teacher = layer.requires_grad_(False).eval()

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def between(self, x):
        with torch.no_grad():
            return x + self.teacher(x[None])[0]


class Tied(Layers):
    def build(self):
        self.other = nn.Linear(8, 8)
        self.same = nn.Linear(8, 8)
        self.same.weight = self.other.weight

    def between(self, x):
        return self.same(torch.tanh(self.other(x)))


class Renormed(Layers):
    """Writes a parameter in its forward pass."""

    def build(self):
        self.table = nn.Embedding(4, 8, max_norm=0.5)

    def between(self, x):
        return x + self.table((x[:, 0] > 0).long())


class WritingData(Layers):
    """Writes a parameter through `.data`, which PyTorch does not count."""

    def between(self, x):
        self.last.weight.data.mul_(0.999)
        return x


class Reading(Layers):
    """Reads an iterator on."""

    def build(self):
        self.cycle = itertools.cycle([1.0, 2.0, 3.0])

    def between(self, x):
        return x * next(self.cycle)


class Teacher:
    """A loss with an average of the model's weights that it moves itself."""

    def __init__(self, model):
        self.model, self.calls = model, 0
        torch.manual_seed(9)
        self.teacher = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def __call__(self, outputs, labels):
        self.calls += 1
        with torch.no_grad():
            wanted = self.teacher(outputs)
            self.teacher[0].weight.lerp_(self.model.last.weight[:, :4], 0.1)
        return nn.functional.cross_entropy(outputs, labels) + (outputs - wanted).square().mean()


class Clipping(Callback):
    """Edits weights, a moment, and for a while all of them."""

    def on_step_end(self, trainer):
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.clamp_(-0.3, 0.3)
        swapped = [p.detach().clone() for p in trainer.model.parameters()]
        for parameter in trainer.model.parameters():
            parameter.data.mul_(2)
        for parameter, before in zip(trainer.model.parameters(), swapped, strict=True):
            parameter.data.copy_(before)


class ClippingData(Callback):
    def on_step_end(self, trainer):
        for parameter in trainer.model.parameters():
            parameter.data.clamp_(-0.2, 0.2)


class CountingMicroBatches(Callback):
    """Counts, draws, and changes gradients in each micro-batch."""

    def __init__(self):
        self.count, self.lines = 0, []

    def on_micro_batch_end(self, trainer):
        self.count += 1
        self.lines.append(random.random() + torch.rand(()).item())
        for parameter in trainer.model.parameters():
            parameter.grad.add_(1e-3 * self.count * self.lines[-1])


def run(folder, model, *, loss=None, callbacks=(), **settings):
    """Train 8 steps of 2 micro-batches; return the Trainer, and what it told of verified steps."""
    lines = []
    batch = {"batch_size": 8, "micro_batch_size": 4, "max_steps": 8, "save_steps": 3}
    allow = ["max_steps"]
    trainer = Trainer(
        model,
        TrainerConfig(
            output_dir=str(folder),
            **{"learning_rate": 0.01, "allow": allow, **batch, **settings},
        ),
        [(x.clone(), y) for x, y in PAIRS],
        loss_fn=nn.CrossEntropyLoss() if loss is None else loss,
        callbacks=callbacks,
        display=NoDisplay(),
    )
    trainer.display.note = lines.append
    trainer.train()
    return trainer, [line for line in lines if line.startswith("verify_steps: step")]
