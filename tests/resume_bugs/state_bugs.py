"""Bugs of a script in what it saves and restores of weights, optimizer, schedule and the like."""

from __future__ import annotations

from resume_bugs.corpus import PARTS, Bug, and_load, with_scheduler
from unbroken.check import Culprit

LOAD = PARTS["load"]
COSINE = "scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=36)"
LOAD_SCHEDULER = 'scheduler.load_state_dict(state["scheduler"])'
AVERAGE_STEP = """
with torch.no_grad():
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 0.1)
"""
NORM_MODEL = "model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))"
TWINS = """
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.left(x)) + self.right(x))


model = Two()
"""
GAN = {
    "model": """
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8))  # the generator
judge = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
""",
    "optimizer": """
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
of_judge = torch.optim.Adam(judge.parameters(), lr=0.01)
""",
    "save": """
state["judge"] = judge.state_dict()
state["of_judge"] = of_judge.state_dict()
""",
    "train": """
fake = model(torch.randn(len(batch), 4))
softplus = nn.functional.softplus
loss = softplus(judge(fake.detach())).mean() + softplus(-judge(batch)).mean()
of_judge.zero_grad()
loss.backward()
of_judge.step()
optimizer.zero_grad()
softplus(-judge(fake)).mean().backward()
optimizer.step()
""",
}
LOAD_JUDGE = 'judge.load_state_dict(state["judge"])'
LOAD_OF_JUDGE = 'of_judge.load_state_dict(state["of_judge"])'

OF_LAST = "torch.optim.SGD(model[2].parameters(), lr=0.01)"
TRIAL = "if IS_RESUMED:\n    model(data[0]).sum().backward()"
OWN_FILE = "torch.save(optimizer.state_dict(), FOLDER / 'optimizer.pt')"

STATE_BUGS = (
    Bug(
        "optimizer_not_loaded",
        "The optimizer's state is saved and never loaded.",
        Culprit.OPTIMIZER,
        {"load": LOAD.replace('optimizer.load_state_dict(state["optimizer"])\n', "")},
        {"load": LOAD},
    ),
    Bug(
        "weights_not_loaded",
        "`load_state_dict(strict=False)` of names with another prefix loads nothing.",
        Culprit.WEIGHTS,
        {
            "load": LOAD.replace(
                'state["model"])',
                '{f"module.{k}": v for k, v in state["model"].items()}, strict=False)',
            )
        },
        {"load": LOAD},
    ),
    Bug(
        "scheduler_not_loaded",
        "The schedule begins again.",
        Culprit.SCHEDULER,
        {"load": LOAD},
        {"load": and_load(LOAD_SCHEDULER)},
        with_scheduler(COSINE),
    ),
    Bug(
        "scheduler_only_at_first",
        "The schedule is made at the first start alone; it would lower the rate much later.",
        Culprit.SCHEDULER,
        {
            "setup": """
scheduler = None
if not IS_RESUMED:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=33)
""",
            "load": LOAD,
        },
        {
            "setup": "scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=33)",
            "load": and_load(LOAD_SCHEDULER),
        },
        {
            "save": 'state["scheduler"] = scheduler and scheduler.state_dict()',
            "after": "if scheduler is not None:\n    scheduler.step()",
        },
    ),
    Bug(
        "scheduler_made_after_loading",
        "A LambdaLR that is made after the optimizer was loaded sets its rate to the first one.",
        Culprit.SCHEDULER,
        {"resumed": "scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)"},
        {
            "resumed": """
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)
if IS_RESUMED:
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
"""
        },
        {"save": 'state["scheduler"] = scheduler.state_dict()', "after": "scheduler.step()"},
    ),
    Bug(
        "saved_before_the_schedule_steps",
        "The checkpoint is written before `scheduler.step()` of its step.",
        Culprit.SCHEDULER,
        {
            "after": """
if step % 4 == 0:
    save(step, epoch, place + 1)
scheduler.step()
""",
            "due": "pass",
        },
        {"after": "scheduler.step()", "due": "save(step, epoch, place + 1)"},
        with_scheduler(COSINE, load=and_load(LOAD_SCHEDULER)),
    ),
    Bug(
        "schedule_steps_on_loading",
        "The schedule is stepped once more after it was loaded.",
        Culprit.SCHEDULER,
        {"load": and_load(LOAD_SCHEDULER, "scheduler.step()")},
        {"load": and_load(LOAD_SCHEDULER)},
        with_scheduler(COSINE),
    ),
    Bug(
        "warmup_again",
        "The rate follows the number of steps of this process.",
        Culprit.SCHEDULER,
        {"train": "set_rate(done)\ndone += 1\n" + PARTS["train"].strip()},
        {"train": "set_rate(step)\ndone += 1\n" + PARTS["train"].strip()},
        {
            "setup": """
done = 0


def set_rate(count):
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * min(1.0, (count + 1) / 30)
"""
        },
    ),
    Bug(
        "rate_of_tokens_seen",
        "The rate follows a count of tokens that is not saved.",
        Culprit.SCHEDULER,
        {"load": LOAD},
        {"load": and_load('tokens = state["tokens"]')},
        {
            "setup": "tokens = 0",
            "save": 'state["tokens"] = tokens',
            "train": """
tokens += batch.numel()
optimizer.param_groups[0]["lr"] = 0.01 / (1 + tokens / 300)
"""
            + PARTS["train"].strip(),
        },
    ),
    Bug(
        "plateau_forgotten",
        "ReduceLROnPlateau is made anew: its best value and its patience are lost.",
        Culprit.SCHEDULER,
        {"load": LOAD},
        {"load": and_load(LOAD_SCHEDULER)},
        with_scheduler(
            "scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)",
            after="scheduler.step(loss.item())",
        ),
    ),
    Bug(
        "scaler_not_loaded",
        "The gradient scaler begins again at its first scale.",
        Culprit.SCALER,
        {"load": LOAD},
        {"load": and_load('scaler.load_state_dict(state["scaler"])')},
        {
            "setup": 'scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5)',
            "save": 'state["scaler"] = scaler.state_dict()',
            "train": """
scaler.scale(model(batch).square().mean()).backward()
scaler.step(optimizer)
scaler.update()
optimizer.zero_grad()
""",
        },
    ),
    Bug(
        "average_not_loaded",
        "The average of the weights begins again at the weights.",
        Culprit.AVERAGE,
        {"load": and_load("average = copy.deepcopy(model)")},
        {"load": and_load('average.load_state_dict(state["average"])')},
        {
            "setup": "average = copy.deepcopy(model)",
            "save": 'state["average"] = average.state_dict()',
            "after": AVERAGE_STEP,
        },
    ),
    Bug(
        "average_only_at_first",
        "The average is made at the first start alone, and no more after a resume.",
        Culprit.AVERAGE,
        {
            "setup": "average = None if IS_RESUMED else torch.optim.swa_utils.AveragedModel(model)",
            "load": LOAD,
        },
        {
            "setup": "average = torch.optim.swa_utils.AveragedModel(model)",
            "load": and_load('average.load_state_dict(state["average"])'),
        },
        {
            "save": 'state["average"] = average and average.state_dict()',
            "after": "if average is not None:\n    average.update_parameters(model)",
        },
    ),
    Bug(
        "average_loaded_as_model",
        "The average is loaded into the model.",
        Culprit.WEIGHTS,
        {
            "load": LOAD.replace('state["model"]', 'state["average"]')
            + 'average.load_state_dict(state["average"])'
        },
        {"load": and_load('average.load_state_dict(state["average"])')},
        {
            "setup": "average = copy.deepcopy(model)",
            "save": 'state["average"] = average.state_dict()',
            "after": AVERAGE_STEP,
        },
    ),
    Bug(
        "target_not_saved",
        "A target network that the loss looks at is made anew from the weights.",
        Culprit.AVERAGE,
        {"load": and_load("target = copy.deepcopy(model)")},
        {"load": and_load('target.load_state_dict(state["target"])')},
        {
            "setup": "target = copy.deepcopy(model)",
            "save": 'state["target"] = target.state_dict()',
            "train": PARTS["train"].replace(
                "model(batch).square()",
                "(model(batch) - 0.9 * target(batch).detach() - 1).square()",
            ),
            "after": "if step % 7 == 0:\n    target.load_state_dict(model.state_dict())",
        },
    ),
    Bug(
        "statistics_not_saved",
        "Parameters alone are saved: BatchNorm's running statistics are lost.",
        Culprit.BUFFERS,
        {"save": 'state["model"] = dict(model.named_parameters())'},
        {"save": ""},
        {
            "model": NORM_MODEL,
            "load": LOAD.replace('state["model"])', 'state["model"], strict=False)'),
        },
    ),
    Bug(
        "weights_in_half_precision",
        "Weights are written in half precision, to save space.",
        Culprit.WEIGHTS,
        {"save": 'state["model"] = {k: v.half() for k, v in model.state_dict().items()}'},
        {"save": 'state["model"] = {k: v.clone() for k, v in model.state_dict().items()}'},
    ),
    Bug(
        "moments_in_half_precision",
        "Moments are written in bfloat16, to save space.",
        Culprit.OPTIMIZER,
        {
            "save": """
for one in state["optimizer"]["state"].values():
    one["exp_avg"] = one["exp_avg"].bfloat16().float()
"""
        },
        {"save": "pass"},
        {"due": "save(step, epoch, place + 1)\nstate = None"},
    ),
    Bug(
        "second_optimizer_not_loaded",
        "The optimizer of a GAN's judge is not loaded.",
        Culprit.OPTIMIZER,
        {"load": and_load(LOAD_JUDGE)},
        {"load": and_load(LOAD_JUDGE, LOAD_OF_JUDGE)},
        GAN,
        kill_after=20,
    ),
    Bug(
        "first_optimizer_not_loaded",
        "The optimizer of a GAN's generator is not loaded; that of its judge is.",
        Culprit.OPTIMIZER,
        {
            "load": LOAD.replace('optimizer.load_state_dict(state["optimizer"])\n', "")
            + "\n".join((LOAD_JUDGE, LOAD_OF_JUDGE))
        },
        {"load": and_load(LOAD_JUDGE, LOAD_OF_JUDGE)},
        GAN,
        kill_after=20,
    ),
    Bug(
        "second_optimizer_only_at_first",
        "A second optimizer, which steps now and then, is made at the first start alone.",
        Culprit.OPTIMIZER,
        {"setup": f"of_last = None if IS_RESUMED else {OF_LAST}"},
        {"setup": f"of_last = {OF_LAST}"},
        {
            "train": """
loss = model(batch).square().mean()
loss.backward()
optimizer.step()
if of_last is not None and step % 5 == 0:
    of_last.step()
optimizer.zero_grad()
"""
        },
    ),
    Bug(
        "judge_not_loaded",
        "A GAN's judge is untrained after a resume.",
        Culprit.WEIGHTS,
        {"load": and_load(LOAD_OF_JUDGE)},
        {"load": and_load(LOAD_JUDGE, LOAD_OF_JUDGE)},
        GAN,
        kill_after=20,
    ),
    Bug(
        "parameters_in_another_order",
        "The optimizer is built over the parameters in another order: each gets another's moments.",
        Culprit.PARAMETER_ORDER,
        {
            "optimizer": """
parts = [model.left, model.right, model.out]
if IS_RESUMED:
    parts = [model.right, model.left, model.out]
optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=0.01)
"""
        },
        {
            "optimizer": """
parts = [model.left, model.right, model.out]
optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=0.01)
"""
        },
        {"model": TWINS},
    ),
    Bug(
        "layer_frozen_again",
        "A layer that training has unfrozen is frozen after a resume.",
        Culprit.GRADIENTS,
        {
            "epoch": "if epoch == 1 and position == 0:\n    model[0].requires_grad_(True)\n"
            + PARTS["epoch"].strip()
        },
        {"epoch": "if epoch >= 1:\n    model[0].requires_grad_(True)\n" + PARTS["epoch"].strip()},
        {"setup": "model[0].requires_grad_(False)"},
    ),
    Bug(
        "train_forgotten",
        "The model is tried out in `eval()` after loading, and stays there.",
        Culprit.MODE,
        {"resumed": "if IS_RESUMED:\n    model.eval()\n    model(data[0])"},
        {"resumed": "if IS_RESUMED:\n    model.eval()\n    model(data[0])\n    model.train()"},
        {"model": "model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 1))"},
    ),
    Bug(
        "other_betas",
        "The optimizer gets other betas after it was loaded.",
        Culprit.SETTINGS,
        {"load": and_load('optimizer.param_groups[0]["betas"] = (0.9, 0.95)')},
        {"load": and_load('optimizer.param_groups[0]["betas"] = (0.9, 0.999)')},
    ),
    Bug(
        "temperature_forgotten",
        "A temperature that falls during training is an attribute of the module, and not saved.",
        Culprit.MODEL,
        {"load": LOAD},
        {"load": and_load('model.temperature = state["temperature"]')},
        {
            "model": """
class Cooled(nn.Sequential):
    temperature = 1.0

    def forward(self, x):
        return super().forward(x) / self.temperature


model = Cooled(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 1))
""",
            "save": 'state["temperature"] = model.temperature',
            "after": "model.temperature *= 0.97",
        },
    ),
    Bug(
        "loss_weight_forgotten",
        "A loss is weighed by its own running mean, which is not saved.",
        Culprit.MODEL,
        {"load": LOAD},
        {"load": and_load('mean = state["mean"]')},
        {
            "setup": "mean = 1.0",
            "save": 'state["mean"] = mean',
            "train": """
loss = model(batch).square().mean()
mean = 0.9 * mean + 0.1 * loss.item()
loss = loss / mean
loss.backward()
optimizer.step()
optimizer.zero_grad()
""",
        },
    ),
    Bug(
        "noise_of_its_own_generator",
        "A layer adds noise from a generator of its own, which is not saved.",
        Culprit.MODEL,
        {"load": LOAD},
        {"load": and_load('model[1].noise.set_state(state["noise"])')},
        {
            "model": """
class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = torch.Generator().manual_seed(5)

    def forward(self, x):
        return x + 0.1 * torch.randn(x.shape, generator=self.noise)


model = nn.Sequential(nn.Linear(8, 16), Noise(), nn.Linear(16, 1))
""",
            "save": 'state["noise"] = model[1].noise.get_state()',
        },
    ),
    Bug(
        "autocast_forgotten",
        "Mixed precision is on at the first start alone.",
        Culprit.MODEL,
        {"setup": "mixed = not IS_RESUMED"},
        {"setup": "mixed = True"},
        {
            "train": """
with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
    loss = model(batch).square().mean()
loss.backward()
optimizer.step()
optimizer.zero_grad()
"""
        },
    ),
    Bug(
        "gradients_left_over",
        "A trial pass after loading leaves its gradients for the first step.",
        Culprit.GRADIENTS,
        {"resumed": TRIAL},
        {"resumed": f"{TRIAL}\n    optimizer.zero_grad()"},
        {"model": "model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))"},
    ),
    Bug(
        "clipping_history_forgotten",
        "Gradients are clipped at a quantile of earlier norms, which are not saved.",
        Culprit.GRADIENTS,
        {"load": LOAD},
        {"load": and_load('norms.extend(state["norms"])')},
        {
            "setup": "norms = deque(maxlen=20)",
            "save": 'state["norms"] = list(norms)',
            "train": """
loss = model(batch).square().mean()
loss.backward()
limit = 0.7 * sorted(norms)[len(norms) // 2] if norms else math.inf
norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
optimizer.step()
optimizer.zero_grad()
""",
        },
    ),
    Bug(
        "weights_of_the_epochs_begin",
        "The weights in a checkpoint are those of the epoch's begin, the rest is of now.",
        Culprit.STALE_WEIGHTS,
        {"save": 'state["model"] = first'},
        {"save": 'state["model"] = copy.deepcopy(model.state_dict())'},
        {"epoch": "first = copy.deepcopy(model.state_dict())\n" + PARTS["epoch"].strip()},
        kill_after=22,
    ),
    Bug(
        "optimizer_saved_less_often",
        "The optimizer has a file of its own, which is written every second time.",
        Culprit.STALE_OPTIMIZER,
        {"due": f"save(step, epoch, place + 1)\nif step % 8 == 0:\n    {OWN_FILE}"},
        {"due": f"save(step, epoch, place + 1)\n{OWN_FILE}"},
        {"load": LOAD.replace('state["optimizer"]', 'torch.load(FOLDER / "optimizer.pt")')},
        kill_after=22,
    ),
    Bug(
        "best_for_last",
        "The best weights and their optimizer are loaded, and go on at the last position.",
        (Culprit.STALE_STATE, Culprit.DATA_SKIPPED),
        {
            "load": LOAD.replace(
                "model.load",
                'best = torch.load(FOLDER / "best.pt", weights_only=False)\nmodel.load',
            )
            .replace('state["model"]', 'best["model"]')
            .replace('state["optimizer"]', 'best["optimizer"]')
        },
        {"load": LOAD},
        {
            "setup": "lowest = math.inf",
            "after": """
if step == 11:
    best = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(best, FOLDER / "best.pt")
""",
        },
    ),
    Bug(
        "lookahead_forgotten",
        "Slow weights of an optimizer are an attribute of it, and not saved.",
        (Culprit.OPTIMIZER, Culprit.AVERAGE),
        {"load": and_load("optimizer.slow = [p.detach().clone() for p in model.parameters()]")},
        {"load": and_load('optimizer.slow = state["slow"]')},
        {
            "optimizer": """
class Lookahead(torch.optim.AdamW):
    def step(self, closure=None):
        super().step(closure)
        for slow, parameter in zip(self.slow, model.parameters(), strict=True):
            slow.lerp_(parameter.detach(), 0.3)
            if step % 5 == 4:
                parameter.data.copy_(slow)


optimizer = Lookahead(model.parameters(), lr=0.01)
optimizer.slow = [p.detach().clone() for p in model.parameters()]
""",
            "save": 'state["slow"] = optimizer.slow',
        },
    ),
    Bug(
        "patience_forgotten",
        "Early stopping begins to count again, so that the resumed run goes on for longer.",
        Culprit.STEPS_EXTRA,
        {"load": LOAD},
        {"load": and_load('waited = state["waited"]')},
        {
            "setup": "waited = 0",
            "save": 'state["waited"] = waited',
            "after": "waited += 1\nif waited == 28:\n    break",
            "end": "if waited >= 28:\n    break",
        },
    ),
)
