"""Small ordinary programs, as their users write them: each resumes exactly, and nothing is said.

Each text follows PRELUDE and is a script by itself. It trains `model` to the end, calls `at(step)`
after each step (where it may be killed), and leaves `report`; `also` holds what else must be equal.
"""

from __future__ import annotations

PRELUDE = """
import argparse, copy, dataclasses, logging, math, os, random, signal, sys, time
from collections import defaultdict, deque
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from unbroken import Callback, Checkpointer, Trainer, TrainerConfig, batch_source

FOLDER, KILL_AT = sys.argv[1], int(sys.argv[2])
also = []
torch.set_num_threads(1)
torch.manual_seed(0)


def at(step):
    if step == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)


x = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
pairs = [(a, b) for a, b in zip(x, y)]


class Net(nn.Module):
    def __init__(self, width=12, p=0.1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(p))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))
"""

LOOP = """
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
{before}
data = batch_source({data}, seed=0, global_batch_size=4{options})
objects = dict(model=model, optimizer=optimizer, data=data{given})
with Checkpointer(FOLDER, save_steps=4, **objects) as checkpointer:
    report = checkpointer.resume()
    step = report.step
    for batch in data.iterate():
        if step == 14:
            break
        inputs, labels = batch.data
        {forward}
        optimizer.step()
        {stepped}
        optimizer.zero_grad()
        data.used(batch)
        step += 1
        {after}
        checkpointer.save_if_due(step)
        at(step)
"""

FORWARD = "loss = F.cross_entropy(model(inputs), labels); loss.backward()"


def loop(**parts: str) -> str:
    """Return the loop with these parts in it; a part of several lines is indented as its place."""
    text = LOOP
    for name, default in PARTS.items():
        lines = parts.get(name, default).strip("\n").split("\n")
        place = next(line for line in text.split("\n") if f"{{{name}}}" in line)
        spaces = " " * (len(place) - len(place.lstrip()))
        text = text.replace(f"{{{name}}}", f"\n{spaces}".join(lines))
    return text


PARTS = {
    **dict.fromkeys(("before", "options", "given", "stepped", "after"), ""),
    "data": "pairs",
    "forward": FORWARD,
}


TRAINER = """
class Kill(Callback):
    def on_step_end(self, trainer):
        at(trainer.progress.step)


{before}
model = {model}
config = TrainerConfig(
    output_dir=FOLDER, batch_size=4, max_steps=14, save_steps=4, logging_steps=5,
    learning_rate=1e-2{config},
)
trainer = Trainer(
    model, config, {data}, loss_fn={loss}, callbacks=[Kill(){callbacks}]{given},
)
report = trainer.train().resume_report
"""


def trainer(**parts: str) -> str:
    defaults = {"before": "", "model": "Net()", "config": "", "data": "pairs", "callbacks": ""}
    text = TRAINER
    for name, part in {**defaults, "loss": "nn.CrossEntropyLoss()", "given": "", **parts}.items():
        text = text.replace(f"{{{name}}}", part)
    return text


NOISY = """
class Noisy(Dataset):
    def __init__(self):
        self.rng = np.random.default_rng(3)
    def __len__(self):
        return len(pairs)
    def __getitem__(self, index):
        return pairs[index][0] + 0.1 * float(self.rng.normal()), pairs[index][1]
noisy = Noisy()
"""

PROGRAMS = {
    "noise from a generator of the data": loop(before=NOISY, data="noisy"),
    "the same in a Trainer that evaluates on the data": trainer(
        before=NOISY,
        data="noisy, eval_dataset=noisy",
        config=", eval_steps=3, micro_batch_size=2",
    ),
    "a loss meter": loop(
        before="""
class Meter:
    def __init__(self):
        self.total, self.count = 0.0, 0
    def update(self, value):
        self.total += value
        self.count += 1
meter = Meter()
""",
        after="meter.update(loss.item())",
    ),
    "timers": loop(
        before="started = time.time(); times = deque(maxlen=5)",
        after="times.append(time.perf_counter()); elapsed = time.time() - started",
    ),
    "a progress bar": loop(
        before="from tqdm import tqdm\nbar = tqdm(total=14, file=open(os.devnull, 'w'))",
        after="bar.update(1); bar.set_postfix(loss=loss.item())",
    ),
    "lists of losses and a dict of metrics": loop(
        before="losses, metrics = [], defaultdict(list)",
        after="losses.append(loss.item()); metrics['lr'].append(optimizer.param_groups[0]['lr'])",
    ),
    "validation between steps by a loader": loop(
        before="val_loader = DataLoader(pairs[:16], batch_size=8)\nbest = math.inf",
        after="""
if step % 3 == 0:
    model.eval()
    with torch.no_grad():
        val = sum(F.cross_entropy(model(a), b).item() for a, b in val_loader)
    best = min(best, val)
    model.train()
""",
    ),
    "validation on shuffled data with a generator of its own": loop(
        before="val_loader = DataLoader(pairs[:16], 8, shuffle=True, generator=torch.Generator())",
        after="""
if step % 4 == 0:
    model.eval()
    with torch.no_grad():
        accuracy = np.mean([(model(a).argmax(1) == b).float().mean().item() for a, b in val_loader])
    model.train()
""",
    ),
    "a scheduler that is registered": loop(
        before="scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=14)",
        given=", scheduler=scheduler",
        stepped="scheduler.step()",
    ),
    "warmup and then a plateau, both registered": loop(
        before="""
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
""",
        given=", warmup=warmup, plateau=plateau",
        stepped="warmup.step()",
        after="if step % 3 == 0: plateau.step(loss.item())",
    ),
    "an average of the weights, registered": loop(
        before="ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn="
        "torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))\nalso.append(ema)",
        given=", ema=ema",
        stepped="ema.update_parameters(model)",
    ),
    "mixed precision with a scaler": loop(
        before="scaler = torch.amp.GradScaler('cpu')",
        given=", scaler=scaler",
        forward="""
with torch.autocast("cpu", dtype=torch.bfloat16):
    loss = F.cross_entropy(model(inputs), labels)
scaler.scale(loss).backward()
scaler.unscale_(optimizer)
nn.utils.clip_grad_norm_(model.parameters(), 1.0)
scaler.step(optimizer)
scaler.update()
""",
    ).replace("        optimizer.step()\n", ""),
    "clipped gradients and smoothed labels": loop(
        forward="""
loss = F.cross_entropy(model(inputs), labels, label_smoothing=0.1)
loss.backward()
norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
""",
    ),
    "accumulated gradients": loop(
        options=", micro_batch_size=4",
        forward="""
for part, label in zip(inputs.chunk(2), labels.chunk(2)):
    loss = F.cross_entropy(model(part), label) / 2
    loss.backward()
""",
    ),
    "two optimizers, as a GAN has": loop(
        before="""
critic = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
also.append(critic)
""",
        given=", critic=critic, critic_optimizer=critic_optimizer",
        forward="""
score = critic(model(inputs).detach()).mean() + critic(F.one_hot(labels, 3).float()).mean().neg()
score.backward()
critic_optimizer.step()
critic_optimizer.zero_grad()
loss = -critic(model(inputs)).mean()
loss.backward()
""",
    ),
    "a data set with a cache": loop(
        before="""
class Cached(Dataset):
    def __init__(self, items):
        self.items, self.cache = items, {}
    def __len__(self):
        return len(self.items)
    def __getitem__(self, index):
        if index not in self.cache:
            self.cache[index] = self.items[index]
        return self.cache[index]
""",
        data="Cached(pairs)",
    ),
    "augmentation from the global generators": loop(
        before="""
class Augmented(Dataset):
    def __len__(self):
        return len(pairs)
    def __getitem__(self, index):
        a, b = pairs[index]
        if random.random() < 0.5:
            a = a.flip(0)
        return a + 0.1 * torch.randn_like(a) * float(np.random.rand()), b
""",
        data="Augmented()",
    ),
    "workers with seeds of their own": loop(
        options=", num_workers=1",
        before="""
class Read(Dataset):
    def __len__(self):
        return len(pairs)
    def __getitem__(self, index):
        return pairs[index]
def seed_worker(worker_id):
    np.random.seed(torch.initial_seed() % 2**32)
""",
        data="Read()",
    ),
    "a shuffling DataLoader, as for MNIST": loop(
        before="loader = DataLoader(pairs, batch_size=4, shuffle=True)",
        data="loader",
    ),
    "a weighted sampler": loop(
        before="""
weights = [1.0] * 24 + [3.0] * 24
loader = DataLoader(pairs, 4, sampler=WeightedRandomSampler(weights, 48))
""",
        data="loader",
    ),
    "loaders behind a cycle and a zip": loop(
        before="""
first, second = (DataLoader(part, 2, shuffle=True) for part in (pairs[:24], pairs[24:34]))
class Together:
    def cycle(self):
        while True:
            yield from second
    def __iter__(self):
        return (tuple(map(torch.cat, zip(a, b))) for a, b in zip(first, self.cycle()))
""",
        data="Together()",
    ),
    "a loader that a thread reads ahead": loop(
        before="""
import queue, threading
class Ahead:
    def __init__(self, loader):
        self.loader = loader
    def __iter__(self):
        ready = queue.Queue()
        def read():
            for batch in self.loader:
                ready.put(batch)
            ready.put(None)
        threading.Thread(target=read, daemon=True).start()
        while (batch := ready.get()) is not None:
            yield batch
""",
        data="Ahead(DataLoader(pairs, 4))",
    ),
    "nanoGPT's get_batch": """
block, tokens = 8, np.random.default_rng(1).integers(0, 31, 2000).astype(np.uint16)
tokens.tofile(FOLDER + ".bin")


def get_batch():
    data = np.memmap(FOLDER + ".bin", dtype=np.uint16, mode="r")
    ix = torch.randint(len(data) - block, (4,))
    a = torch.stack([torch.from_numpy(data[i : i + block].astype(np.int64)) for i in ix])
    b = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block].astype(np.int64)) for i in ix])
    return a, b


def get_lr(it):
    return 1e-2 * min(1.0, (it + 1) / 4) * (0.5 + 0.5 * math.cos(math.pi * it / 14))


model = nn.Sequential(nn.Embedding(31, 16), nn.Dropout(0.1), nn.Linear(16, 31))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
with Checkpointer(FOLDER, save_steps=4, model=model, optimizer=optimizer) as checkpointer:
    report = checkpointer.resume()
    iter_num, best_val_loss, t0 = report.step, 1e9, time.time()
    while iter_num < 14:
        for group in optimizer.param_groups:
            group["lr"] = get_lr(iter_num)
        X, Y = get_batch()
        loss = F.cross_entropy(model(X).view(-1, 31), Y.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        t1 = time.time()
        dt, t0 = t1 - t0, t1
        iter_num += 1
        checkpointer.save_if_due(iter_num)
        at(iter_num)
""",
    "arguments in a namespace": loop(
        before="""
args = argparse.Namespace(epochs=2, lr=1e-2, run_name=time.strftime("%Y%m%d-%H%M%S"))
for group in optimizer.param_groups:
    group["lr"] = args.lr
""",
        after="args.global_step = step",
    ),
    "a dataclass of arguments, and a log file": loop(
        before="""
@dataclasses.dataclass
class Args:
    weight_decay: float = 0.01
    output: str = FOLDER + "-logs"
args = Args()
logging.basicConfig(filename=FOLDER + ".log", level=logging.INFO)
log = logging.getLogger("train")
""",
        after='log.info("step %d loss %.4f", step, loss.item())',
    ),
    "a logger like W&B's": loop(
        before="""
class Run:
    def __init__(self):
        self.id, self.step, self.history = os.urandom(4).hex(), 0, []
    def log(self, values):
        self.step += 1
        self.history.append(values)
wandb = Run()
""",
        after='wandb.log({"loss": loss.item(), "time": time.time()})',
    ),
    "early stopping that never stops": loop(
        before="""
class EarlyStopping:
    def __init__(self, patience=100):
        self.patience, self.best, self.bad = patience, math.inf, 0
    def __call__(self, value):
        self.best, self.bad = (value, 0) if value < self.best else (self.best, self.bad + 1)
        return self.bad >= self.patience
stopping = EarlyStopping()
""",
        after="if stopping(loss.item()): break",
    ),
    "the best weights kept beside": loop(
        before="best_loss, best_state = math.inf, None",
        after="""
if loss.item() < best_loss:
    best_loss, best_state = loss.item(), copy.deepcopy(model.state_dict())
""",
    ),
    "BatchNorm, frozen layers and weight init by hand": loop(
        before="""
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
nn.init.xavier_uniform_(model[0].weight)
model[0].bias.requires_grad_(False)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
""",
    ),
    "a search for the learning rate before": loop(
        before="""
probe, losses = copy.deepcopy(model), []
for rate in (1e-4, 1e-3):
    probe_optimizer = torch.optim.SGD(probe.parameters(), lr=rate)
    F.cross_entropy(probe(x[:8]), y[:8]).backward()
    probe_optimizer.step()
""",
    ),
    "seeds by hand": loop(
        before="""
def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
seed_everything(7)
""",
        after="noise = random.random() + np.random.rand()",
    ),
    "hooks that look at activations": loop(
        before="""
activations = {}
def keep(module, inputs, output):
    activations["head"] = output.detach().mean().item()
model.head.register_forward_hook(keep)
""",
    ),
    "numbers of layers that a schedule moves, and hooks and schedules with counters": loop(
        before="""
model.body.insert(1, nn.BatchNorm1d(12))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
average = [p.detach().clone() for p in model.parameters()]
calls = {"schedule": 0, "gradients": 0}
def after_step(*_):
    for mean, p in zip(average, model.parameters()):
        mean.lerp_(p.detach(), 0.1)
def count(gradient):
    calls["gradients"] += 1
    return gradient * (1 + 1 / calls["gradients"])
def slower(_):
    calls["schedule"] += 1
    return 1 / calls["schedule"]
class Centered:
    def __init__(self):
        self.mean = 0.0
    def __call__(self, module, inputs, output):
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean().item()
        return output - self.mean
optimizer.register_step_post_hook(after_step)
model.head.weight.register_hook(count)
model.head.register_forward_hook(Centered())
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, slower)
""",
        given=", scheduler=scheduler",
        stepped="scheduler.step()",
        after="model.body[3].p *= 0.9; model.body[1].momentum *= 0.9",
    )
    + "also.append(nn.ParameterList(average))\n",
    "our Trainer": trainer(),
    "our Trainer with a schedule, clipping and evaluation": trainer(
        config=', lr_scheduler_type="cosine", warmup_steps=3, max_grad_norm=0.5, eval_steps=5',
        given=", eval_dataset=pairs[:8]",
    ),
    "our Trainer with callbacks that count": trainer(
        before="""
class Timer(Callback):
    def __init__(self):
        self.began = time.time()
    def on_log(self, trainer, statistics):
        self.seconds = time.time() - self.began
""",
        callbacks=", Timer()",
    ),
    "our Trainer with a loss that counts in all places that functions know": trainer(
        before="""
from types import SimpleNamespace
CALLS, LAST, DRAWN = 0, [1.0], random.Random(2)
def make_loss():
    ema, noise = 1.0, [np.random.default_rng(0), np.random.RandomState(1)]
    def loss_fn(logits, labels):
        global CALLS
        nonlocal ema
        loss = F.cross_entropy(logits, labels)
        CALLS += 1
        loss_fn.calls += 1
        Meter.seen += 1
        LAST[0] = ema = 0.9 * ema + 0.1 * loss.item()
        drawn = noise[0].random() + noise[1].rand() + DRAWN.random()
        return loss * (1 / ema + 1 / CALLS + 1 / loss_fn.calls + 1 / Meter.seen + drawn)
    loss_fn.calls = 0
    return loss_fn
class Meter:
    seen = 0
    def __init__(self):
        self.counts, self.space = defaultdict(int), SimpleNamespace(steps=0)
        self.start = self.since = 0.5
        self.loss_fn = make_loss()
    def loss(self, logits, labels):
        self.counts["calls"] += 1
        self.space.steps += 1
        self.start, self.since = self.start * 0.9, self.since * 0.8
        scale = 1 / self.counts["calls"] + 1 / self.space.steps + self.start + self.since
        return self.loss_fn(logits, labels) * scale
""",
        loss="Meter().loss",
    ),
    "our Trainer subclassed, with a loss of its own": trainer(
        before="""
class Smooth(nn.Module):
    def __init__(self, by=0.1):
        super().__init__()
        self.by = by
    def forward(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=self.by)
""",
        loss="Smooth()",
        config=", micro_batch_size=2",
    ),
}
"""By what is ordinary about them."""


OF_RANKS = {
    "DDP with BatchNorm, over a loader dealt to the ranks": """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DistributedSampler
from unbroken.distributed import join

group = join()
rank = dist.get_rank()
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
ddp = DDP(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=6, gamma=0.5)
loader = DataLoader(pairs, batch_size=4, sampler=DistributedSampler(pairs, shuffle=True))
val_loader = DataLoader(pairs[:16], batch_size=8)
sizes = dict(global_batch_size=8, micro_batch_size=4, world_size=2)
data = batch_source(loader, seed=0, rank=rank, **sizes)
objects = dict(model=ddp, optimizer=optimizer, scheduler=scheduler, data=data)
with Checkpointer(FOLDER, save_steps=4, ranks=group, **objects) as checkpointer:
    report = checkpointer.resume()
    step, running = report.step, 0.0
    for batch in data.iterate():
        if step == 14:
            break
        ddp.train()
        inputs, labels = batch.data
        loss = F.cross_entropy(ddp(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        data.used(batch)
        step += 1
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        running += mean.item() / 2
        if step % 6 == 0 and rank == 0:
            model.eval()
            with torch.no_grad():
                hits = sum((model(a).argmax(1) == b).sum().item() for a, b in val_loader)
        checkpointer.save_if_due(step)
        at(step)
""",
    "DDP with BatchNorm and dropout, gradients accumulated": """
import contextlib
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from unbroken.distributed import join

group = join()
rank = dist.get_rank()
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
ddp = DDP(model, gradient_as_bucket_view=True)
optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
sizes = dict(global_batch_size=8, micro_batch_size=2, world_size=2)
data = batch_source(pairs, seed=0, rank=rank, **sizes)
objects = dict(model=ddp, optimizer=optimizer, data=data)
with Checkpointer(FOLDER, save_steps=4, ranks=group, **objects) as checkpointer:
    report = checkpointer.resume()
    micros = data.iterate()
    for step in range(report.step + 1, 15):
        for part in range(2):
            batch = next(micros)
            inputs, labels = batch.data
            with ddp.no_sync() if part == 0 else contextlib.nullcontext():
                (F.cross_entropy(ddp(inputs), labels) / 2).backward()
            data.used(batch)
        nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        checkpointer.save_if_due(step)
        at(step)
""",
}
"""Hand-written loops of two ranks."""

HOST = """
from transformers import (
    EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, HfArgumentParser, PreTrainedTokenizerFast,
    TrainerCallback, TrainingArguments, default_data_collator,
)
from unbroken.adapters.transformers import Trainer


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        at(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        pass  # a save is waited for


def small_gpt2():
    size = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=257, n_positions=16)
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=256, eos_token_id=256))


TEXT = b"it was the best of times, it was the worst of times, it was the age of wisdom. " * 12
SETTINGS = dict(
    output_dir=FOLDER, max_steps=14, save_steps=4, logging_steps=5, learning_rate=1e-2,
    per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
    dataloader_pin_memory=False,
)
"""
"""What follows PRELUDE in a script around the host's Trainer."""

OF_THE_DROP_IN = {
    "a LoRA fine-tuning": """
from peft import LoraConfig, TaskType, get_peft_model

peft_config = LoraConfig(
    task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["c_attn"],
    fan_in_fan_out=True,
)
model = get_peft_model(small_gpt2(), peft_config)
model.print_trainable_parameters()
model.enable_input_require_grads()
model.config.use_cache = False
rows = [list(TEXT[i : i + 16]) for i in range(0, 640, 16)]
rows = [{"input_ids": row, "attention_mask": [1] * 16, "labels": row[:]} for row in rows]
arguments = TrainingArguments(
    **SETTINGS, gradient_accumulation_steps=2, warmup_steps=2, lr_scheduler_type="cosine",
    weight_decay=0.01, gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": False},
)
trainer = Trainer(
    model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator,
    callbacks=[Kill()],
)
trainer.train()
model.save_pretrained(FOLDER + "-adapter")
report = trainer.resume_report
""",
    "run_clm": """
from itertools import chain
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, EvalPrediction, set_seed
from transformers.trainer_utils import get_last_checkpoint


@dataclasses.dataclass
class DataTrainingArguments:
    block_size: int = dataclasses.field(default=16, metadata={"help": "length of a block"})
    max_eval_samples: int = dataclasses.field(default=8, metadata={"help": "for debugging"})


class Table(Dataset):
    # columns by name, as `datasets` has them
    def __init__(self, columns):
        self.columns = columns

    @property
    def column_names(self):
        return list(self.columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}

    def map(self, function):
        return Table(function(self.columns))

    def select(self, indices):
        return Table({name: [c[i] for i in indices] for name, c in self.columns.items()})


parser = HfArgumentParser((DataTrainingArguments, TrainingArguments))
data_args, training_args = parser.parse_dict(dict(
    **SETTINGS, do_train=True, do_eval=True, eval_strategy="steps", eval_steps=5, warmup_steps=3,
    lr_scheduler_type="linear", seed=11,
))
logging.basicConfig(format="%(name)s %(message)s", handlers=[logging.FileHandler(FOLDER + ".log")])
logger = logging.getLogger(__name__)
logger.warning(f"Process rank: {training_args.local_process_index}, {training_args.device}")
last_checkpoint = None
if os.path.isdir(training_args.output_dir) and training_args.do_train:
    last_checkpoint = get_last_checkpoint(training_args.output_dir)
set_seed(training_args.seed)
vocabulary = {"[UNK]": 0, "[PAD]": 1, **{chr(97 + i): 2 + i for i in range(26)}}
letters = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="[PAD]")


def tokenize_function(examples):
    return {"input_ids": tokenizer(examples["text"])["input_ids"]}


def group_texts(examples):
    ids = list(chain(*examples["input_ids"]))
    size = data_args.block_size
    blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return {"input_ids": blocks, "attention_mask": [[1] * size for _ in blocks]}


def preprocess_logits_for_metrics(logits, labels):
    return logits.argmax(dim=-1)


def compute_metrics(prediction: EvalPrediction):
    labels, found = prediction.label_ids[:, 1:], prediction.predictions[:, :-1]
    return {"accuracy": float((labels == found).mean())}


lm_datasets = Table({"text": [TEXT.decode()]}).map(tokenize_function).map(group_texts)
train_dataset = lm_datasets.select(range(40))
eval_dataset = lm_datasets.select(range(40, 40 + data_args.max_eval_samples))
model = small_gpt2()
model.resize_token_embeddings(len(tokenizer))
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=train_dataset,
    eval_dataset=eval_dataset,
    processing_class=tokenizer,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    compute_metrics=compute_metrics,
    preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    callbacks=[Kill()],
)
checkpoint = None
if training_args.resume_from_checkpoint is not None:
    checkpoint = training_args.resume_from_checkpoint
elif last_checkpoint is not None:
    checkpoint = last_checkpoint
train_result = trainer.train(resume_from_checkpoint=checkpoint)
report = trainer.resume_report
trainer.save_model()
metrics = train_result.metrics
metrics["train_samples"] = len(train_dataset)
trainer.save_metrics("train", metrics)
trainer.save_state()
metrics = trainer.evaluate()
metrics["perplexity"] = math.exp(metrics["eval_loss"])
trainer.save_metrics("eval", metrics)
""",
    "a subclass with a loss and a step of its own": """
class WeightedTrainer(Trainer):
    def __init__(self, *args, class_weights=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.class_weights = class_weights

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(inputs["x"])
        loss = F.cross_entropy(logits, labels, weight=self.class_weights)
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.started = time.time()
        return loss

    def get_eval_dataloader(self, eval_dataset=None):
        return DataLoader(self.eval_dataset, 3, shuffle=True, collate_fn=self.data_collator)


model = Net()
rows = [{"x": a, "labels": b} for a, b in pairs]
arguments = TrainingArguments(
    **SETTINGS, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True,
    metric_for_best_model="loss", label_names=["labels"], remove_unused_columns=False,
)
trainer = WeightedTrainer(
    model, arguments, train_dataset=rows, eval_dataset=rows[:7],
    data_collator=default_data_collator,
    class_weights=torch.tensor([1.0, 2.0, 1.0]),
    callbacks=[EarlyStoppingCallback(early_stopping_patience=50), Kill()],
)
trainer.train()
report = trainer.resume_report
""",
}
"""Scripts around the drop-in for the host's Trainer; HOST precedes each."""
