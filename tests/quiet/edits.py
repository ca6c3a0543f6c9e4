"""A user's script, and what may be done to it between two starts."""

# ruff: noqa: E501 (one edit a line)

from __future__ import annotations

SCRIPT = '''
SCALE = 2.0
CLASS_WEIGHTS = [1.0, 2.0, 1.0]
LOGS = FOLDER + "-logs"
NAMES = {"small": 12, "large": 24}


def jitter(a, by=0.05):
    return a + by * torch.randn_like(a)


def flip(a):
    return a.flip(0) if random.random() < 0.5 else a


class Points(Dataset):
    """Points in a plane."""

    def __init__(self, n=48, transforms=(flip, jitter), offset=0.0):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 6, generator=generator)
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0).long()
        self.transforms, self.offset = transforms, offset

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        a = self.x[index] + self.offset
        for transform in self.transforms:
            a = transform(a)
        return a, self.y[index]


def collate(samples):
    a = torch.stack([one for one, _ in samples])
    mask = torch.rand(a.shape) > 0.15
    return F.pad(a * mask, (0, 2), value=0.0), torch.stack([two for _, two in samples])


class Model(nn.Module):
    def __init__(self, width=NAMES["small"], p=0.1):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(width, 3)

    def forward(self, a):
        hidden = F.relu(self.norm(self.first(a)))
        return self.head(self.drop(hidden)) / SCALE


def make_loss(smoothing):
    weight = torch.tensor(CLASS_WEIGHTS)

    def loss_fn(logits, labels):
        error = F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing)
        return error + 1e-4 * logits.square().mean()

    return loss_fn


def describe(value):
    return f"value {value}"


class Kill(Callback):
    def on_step_end(self, trainer):
        at(trainer.progress.step)


model = Model()
for parameter in model.norm.parameters():
    parameter.requires_grad_(True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
config = TrainerConfig(
    output_dir=FOLDER, batch_size=4, max_steps=12, save_steps=4, logging_steps=5, seed=3,
    max_grad_norm=1.0,
)
trainer = Trainer(
    model, config, Points(), collate_fn=collate, loss_fn=make_loss(0.1),
    optimizer=optimizer, scheduler=scheduler, callbacks=[Kill()],
)
report = trainer.train().resume_report
'''

HARMLESS = {
    "a comment": ("SCALE = 2.0\n", "SCALE = 2.0  # of the logits\n"),
    "a comment in forward": ("        hidden = F", "        # normalised first\n        hidden = F"),
    "a comment in a loss": ("        error = F", "        # of all classes\n        error = F"),
    "a docstring": ('"""Points in a plane."""', '"""Points, each in one of three classes."""'),
    "a docstring of a model": ("class Model(nn.Module):\n", 'class Model(nn.Module):\n    """MLP."""\n\n'),
    "a docstring of a function": ("def flip(a):\n", 'def flip(a):\n    """Turn it round."""\n'),
    "no docstring": ('    """Points in a plane."""\n\n', ""),
    "type hints in forward": ("def forward(self, a):\n        hidden",
                              "def forward(self, a: torch.Tensor) -> torch.Tensor:\n        hidden"),
    "type hints in a transform": ("def flip(a):", "def flip(a: torch.Tensor) -> torch.Tensor:"),
    "type hints in a data set": ("def __getitem__(self, index):\n        a = self",
                                 "def __getitem__(self, index: int) -> tuple:\n        a = self"),
    "blank lines": ("        hidden = F", "\n        hidden = F"),
    "blank lines in a collator": ("    mask = torch", "\n    mask = torch"),
    "other quotes": ('NAMES["small"]', "NAMES['small']"),
    "a line broken in two": ("hidden = F.relu(self.norm(self.first(a)))",
                             "hidden = F.relu(\n            self.norm(self.first(a))\n        )"),
    "brackets": ("return self.head(self.drop(hidden)) / SCALE",
                 "return (self.head(self.drop(hidden)) / SCALE)"),
    "a number spelled otherwise": ("SCALE = 2.0", "SCALE = 20e-1"),
    "a trailing comma": ("transforms=(flip, jitter)", "transforms=(flip, jitter,)"),
    "an unused function": ("def describe(value):", "def unused():\n    pass\n\n\ndef describe(value):"),
    "an unused function gone": ("def describe(value):\n    return f\"value {value}\"\n", ""),
    "an unused function edited": ("value {value}", "the value is {value}"),
    "an unused class": ("class Kill(", "class Unused:\n    size = 3\n\n\nclass Kill("),
    "an unused constant": ("SCALE = 2.0\n", "SCALE = 2.0\nVERSION = 3\n"),
    "an unused constant edited": ('"large": 24', '"large": 48'),
    "an import": ("SCALE = 2.0\n", "import json\nSCALE = 2.0\n"),
    "another order of imports": ("SCALE = 2.0\n", "import sys\nimport os\nSCALE = 2.0\n"),
    "a function moved": ("SCALE = 2.0\n", "def zero():\n    return 0\n\n\nSCALE = 2.0\n"),
    "other folders for logs": ('"-logs"', '"-other-logs"'),
    "a print at the start": ("model = Model()\n", "print('step 0: begin')\nmodel = Model()\n"),
    "a print at the end": ("report = trainer", "print('step 0: go')\nreport = trainer"),
    "a timer": ("model = Model()\n", "began = time.time()\nmodel = Model()\n"),
    "a count of parameters": ("config = Trainer", "size = sum(p.numel() for p in model.parameters())\nconfig = Trainer"),
    "saved more often": ("save_steps=4", "save_steps=2"),
    "saved by time, too": ("save_steps=4", "save_steps=4, save_minutes=30"),
    "fewer checkpoints kept": ("save_steps=4", "save_steps=4, save_total_limit=2"),
    "logged more often": ("logging_steps=5", "logging_steps=1"),
    "logged by time": ("logging_steps=5", "logging_steps=5, logging_minutes=1"),
    "a digest of the data in the log": ("seed=3", "seed=3, log_data_digest=True"),
    "workers": ("seed=3", "seed=3, dataloader_num_workers=1"),
    "pinned memory": ("seed=3", "seed=3, dataloader_pin_memory=False"),
    "a time limit": ("seed=3", 'seed=3, max_time="10:00:00"'),
    "saves beside the training": ("seed=3", 'seed=3, save_mode="async"'),
    "more steps of a schedule by step": ("max_steps=12", "max_steps=14"),
    "a checkpoint kept now and then": ("seed=3", "seed=3, keep_every_n_steps=4"),
    "a default written out": ("seed=3", "seed=3, shuffle=True"),
    "an argument by its name": ("make_loss(0.1)", "make_loss(smoothing=0.1)"),
    "the default given": ("Points()", "Points(48)"),
    "an optimizer's default given": ("lr=1e-2,", "lr=1e-2, eps=1e-8,"),
    "a constant's type hint": ("SCALE = 2.0\n", "SCALE: float = 2.0\n"),
    "frozen and unfrozen again": ("optimizer = torch", "model.head.bias.requires_grad_(False)\nmodel.head.bias.requires_grad_(True)\noptimizer = torch"),
    "a random number drawn before": ("model = Model()\n", "_ = random.random()\nmodel = Model()\n"),
    "a list in place of a generator": ("torch.stack([two for _, two in samples])", "torch.stack([ two for _, two in samples ])"),
}  # fmt: skip
"""By what is done: a text that stands in the script once, and what it becomes."""

HARMFUL = {
    "another learning rate": ("lr=1e-2", "lr=2e-2"),
    "another beta": ("betas=(0.9, 0.99)", "betas=(0.8, 0.99)"),
    "another second beta": ("betas=(0.9, 0.99)", "betas=(0.9, 0.999)"),
    "another weight decay": ("weight_decay=0.01", "weight_decay=0.1"),
    "another epsilon": ("weight_decay=0.01", "weight_decay=0.01, eps=1e-3"),
    "amsgrad": ("weight_decay=0.01", "weight_decay=0.01, amsgrad=True"),
    "maximize": ("weight_decay=0.01", "weight_decay=0.01, maximize=True"),
    "another optimizer": ("torch.optim.AdamW(", "torch.optim.NAdam("),
    "groups of parameters": ("AdamW(model.parameters()", 'AdamW([{"params": model.first.parameters()}, {"params": [*model.norm.parameters(), *model.head.parameters()]}]'),
    "fewer parameters": ("AdamW(model.parameters()", "AdamW(model.head.parameters()"),
    "another step of the schedule": ("step_size=5", "step_size=3"),
    "another decay of the schedule": ("gamma=0.5", "gamma=0.9"),
    "another schedule": ("torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)", "torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)"),
    "another seed": ("seed=3", "seed=4"),
    "another seed of the data": ("seed=3", "seed=3, data_seed=9"),
    "no shuffling": ("seed=3", "seed=3, shuffle=False"),
    "another batch size": ("batch_size=4", "batch_size=8"),
    "another clipping": ("max_grad_norm=1.0", "max_grad_norm=0.1"),
    "bf16": ("seed=3", "seed=3, bf16=True"),
    "another length of the epoch": ("seed=3", "seed=3, samples_per_epoch=40"),
    "more dropout": ("p=0.1):", "p=0.3):"),
    "another width": ('width=NAMES["small"]', 'width=NAMES["large"]'),
    "another width by a constant": ('"small": 12', '"small": 16'),
    "another activation": ("F.relu(", "F.gelu("),
    "another norm": ("nn.LayerNorm(width)", "nn.LayerNorm(width, eps=0.1)"),
    "another kind of norm": ("nn.LayerNorm(width)", "nn.RMSNorm(width)"),
    "no norm in forward": ("self.norm(self.first(a))", "self.first(a)"),
    "dropout before": ("self.head(self.drop(hidden))", "self.head(hidden)"),
    "a residual": ("self.head(self.drop(hidden))", "self.head(self.drop(hidden) + hidden)"),
    "a global that scales": ("SCALE = 2.0", "SCALE = 3.0"),
    "a sign in forward": ("/ SCALE", "/ -SCALE"),
    "a layer without bias": ("self.head = nn.Linear(width, 3)", "self.head = nn.Linear(width, 3, bias=False)"),
    "frozen layers": ("model.norm.parameters():\n    parameter.requires_grad_(True)", "model.norm.parameters():\n    parameter.requires_grad_(False)"),
    "evaluation mode of a part": ("model = Model()\n", "model = Model()\nmodel.drop.eval()\n"),
    "other weights of the classes": ("[1.0, 2.0, 1.0]", "[1.0, 5.0, 1.0]"),
    "no weights of the classes": ("labels, weight=weight,", "labels,"),
    "other smoothing, in a closure": ("make_loss(0.1)", "make_loss(0.2)"),
    "another penalty": ("1e-4 * logits", "1e-2 * logits"),
    "another loss": ("F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing)", "F.multi_margin_loss(logits, labels)"),
    "a sum in place of a mean": ("logits.square().mean()", "logits.square().sum()"),
    "more jitter, a default argument": ("by=0.05", "by=0.5"),
    "other noise": ("torch.randn_like(a)", "torch.rand_like(a)"),
    "more flips": ("random.random() < 0.5", "random.random() < 0.9"),
    "another axis": ("random.random() < 0.5 else a", "random.random() < 0.5 else -a"),
    "another order of augmentation": ("transforms=(flip, jitter)", "transforms=(jitter, flip)"),
    "no augmentation": ("transforms=(flip, jitter)", "transforms=()"),
    "an offset of the data": ("offset=0.0", "offset=1.0"),
    "other data": ("manual_seed(1)\n        self.x", "manual_seed(2)\n        self.x"),
    "fewer data": ("n=48", "n=40"),
    "other labels": ("(self.x[:, 1] > 0)", "(self.x[:, 2] > 0)"),
    "another mask": ("> 0.15", "> 0.5"),
    "other padding": ("value=0.0", "value=1.0"),
    "padding at the other side": ("(0, 2), value", "(2, 0), value"),
    "no collator": ("collate_fn=collate", "collate_fn=lambda s: collate(s[::-1])"),
}  # fmt: skip
"""The same, of what changes the training."""

LOOP_EDITS = {
    "clipping": ("model.parameters(), 1.0)", "model.parameters(), 0.1)"),
    "smoothing": ("label_smoothing=0.1", "label_smoothing=0.3"),
    "another loss": ("F.cross_entropy(model(inputs), labels, label_smoothing=0.1)", "F.multi_margin_loss(model(inputs), labels)"),
    "a step left out": ("optimizer.zero_grad()", "step % 2 or optimizer.zero_grad()"),
    "another slope": ("loss.backward()", "(2 * loss).backward()"),
    "noise": ("model(inputs)", "model(inputs + 0.1)"),
}  # fmt: skip
"""What changes the training, in a loop of the user's own that no registered object reaches."""
