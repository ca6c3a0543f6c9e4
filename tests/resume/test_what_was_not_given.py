"""What steers a hand-written loop and was not given is found: saved, told, or refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import runpy
import signal
import sys
from pathlib import Path

import pytest

from fresh import run_fresh
from unbroken.cli.main import main
from unbroken.errors import UnbrokenError
from unbroken.storage import storage_at
from unbroken.store import CheckpointReader

SAVED, KILLED, END = 4, 6, 12
LOOP = """
import os, signal, sys, torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as schedules
from unbroken import Checkpointer, ResumePolicy, batch_source

FOLDER, STOP = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
samples = [torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(40)]
data = batch_source(samples, seed=0, global_batch_size=4)
given = {"model": model, "optimizer": optimizer, "data": data}

{setup}
with Checkpointer(FOLDER, save_steps=4, **given) as checkpointer:
    report = checkpointer.resume()
    step = report.step
    {resumed}
    for batch in data.iterate():
        if step == 12:
            break
        x = batch.data
        {before}
        loss = model(x).square().mean()
        {backward}
        {step}
        {clear}
        data.used(batch)
        step += 1
        if step == STOP:
            os.kill(os.getpid(), signal.SIGKILL)
        values = None
        {after}
        checkpointer.save_if_due(step, values)
"""
PARTS = {
    "setup": "",
    "resumed": "",
    "before": "",
    "backward": "loss.backward()",
    "step": "optimizer.step()",
    "clear": "optimizer.zero_grad()",
    "after": "",
}
IS = {"scheduler": "schedules.CosineAnnealingLR(optimizer, T_max=12)"}


def script(**parts: str) -> str:
    """Return the loop with some of its parts; each part is one or more lines."""
    text = LOOP
    for name, part in {**PARTS, **parts}.items():
        place = "{" + name + "}"
        line = next(line for line in text.splitlines() if place in line)
        indent = line[: len(line) - len(line.lstrip())]
        text = text.replace(line, "\n".join(indent + one for one in part.strip().splitlines()))
    return text


def start(path: str, folder: str, stop: int) -> None:
    """Run a script as its user would; write what came out beside it."""
    sys.argv = [path, folder, str(stop)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            names = runpy.run_path(path, run_name="__main__")
    except UnbrokenError as error:
        notes = getattr(error, "__notes__", [])
        found = {"error": type(error).__name__, "message": "\n".join([str(error), *notes])}
    else:
        bits = b"".join(p.detach().numpy().tobytes() for p in names["model"].parameters())
        report = names["report"]
        found = {
            "bits": hashlib.sha256(bits).hexdigest(),
            "rate": names["optimizer"].param_groups[0]["lr"],
            "verdict": report.verdict,
            "began": report.step,
            "lines": report.lines(),
        }
    Path(path).with_suffix(".json").write_text(json.dumps({**found, "out": printed.getvalue()}))


class Loop:
    """A script that is started again and again in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, text: str, *, stop: int = -1, out: str = "run") -> dict:
        path = self.folder / "train.py"
        path.write_text(text)
        status = run_fresh(start, str(path), str(self.folder / out), stop)
        assert status == (-signal.SIGKILL if stop > 0 else 0)
        return {} if stop > 0 else json.loads(path.with_suffix(".json").read_text())

    def killed_and_resumed(self, text: str, again: str | None = None) -> dict:
        self.run(text, stop=KILLED)
        return self.run(text if again is None else again)


@pytest.fixture
def loop(tmp_path):
    return Loop(tmp_path)


SCHEDULES = {
    "CosineAnnealingLR": "schedules.CosineAnnealingLR(optimizer, T_max=12)",
    "ReduceLROnPlateau": "schedules.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)",
    "SequentialLR": "schedules.SequentialLR(optimizer, [schedules.LinearLR(optimizer, 0.1, "
    "total_iters=3), schedules.CosineAnnealingLR(optimizer, 9)], [3])",
    "ChainedScheduler": "schedules.ChainedScheduler([schedules.LinearLR(optimizer, 0.1, "
    "total_iters=5), schedules.ExponentialLR(optimizer, 0.9)])",
    "SWALR": "torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=6)",
    "OneCycleLR": "schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)",
    "Own": "Own(optimizer)",
}
OWN = """
class Own:
    def __init__(self, optimizer):
        self.optimizer, self.n = optimizer, 0
    def step(self):
        self.n += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + self.n)
    def state_dict(self):
        return {"n": self.n}
    def load_state_dict(self, state):
        self.n = state["n"]
"""


def scheduled(make: str, **parts: str) -> str:
    takes = "loss.item()" if "Plateau" in make else ""
    setup = f"{OWN if 'Own' in make else ''}\nscheduler = {make}"
    return script(**{"setup": setup, "step": f"optimizer.step()\nscheduler.step({takes})", **parts})


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_that_was_not_given_is_saved_and_restored(kind, loop):
    text = scheduled(SCHEDULES[kind])
    whole, resumed = loop.run(text, out="whole"), loop.killed_and_resumed(text)
    assert (resumed["began"], resumed["verdict"]) == (SAVED, "exact")
    assert (resumed["bits"], resumed["rate"]) == (whole["bits"], whole["rate"])
    line = f"scheduler ({kind}) was found on the optimizer: it is saved and restored with it"
    assert resumed["lines"].count(line) == whole["lines"].count(line) == 1


def test_a_schedule_that_no_frame_shows_is_found_too(loop):
    hidden = "step_it = (lambda one: one.step)(schedules.CosineAnnealingLR(optimizer, T_max=12))"
    text = script(setup=hidden, step="optimizer.step()\nstep_it()")
    resumed = loop.killed_and_resumed(text)
    assert resumed["bits"] == loop.run(text, out="whole")["bits"]


def test_a_schedule_that_accelerate_has_wrapped_is_found_too(loop):
    setup = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
plain = schedules.CosineAnnealingLR(optimizer, T_max=12)
model, optimizer, scheduler = accelerator.prepare(model, optimizer, plain)
del plain
given |= {"model": accelerator.unwrap_model(model), "optimizer": optimizer}
"""
    parts = {"backward": "accelerator.backward(loss)", "step": "optimizer.step()\nscheduler.step()"}
    text = script(setup=setup, **parts)
    resumed = loop.killed_and_resumed(text)
    assert resumed["bits"] == loop.run(text, out="whole")["bits"]
    assert resumed["verdict"] == "exact"


def test_one_of_two_optimizers_and_a_warmup_beside_a_given_schedule_are_found(loop):
    setup = """
other = torch.optim.SGD([model[2].bias], lr=0.1)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not model[2].bias], lr=0.01)
scheduler = schedules.CosineAnnealingLR(optimizer, T_max=12)
warmup = schedules.LinearLR(optimizer, 0.1, total_iters=6)
second = schedules.StepLR(other, step_size=2)
given |= {"optimizer": optimizer, "other": other, "scheduler": scheduler}
"""
    steps = "optimizer.step()\nother.step()\nscheduler.step()\nwarmup.step()\nsecond.step()"
    text = script(setup=setup, step=steps + "\nother.zero_grad()")
    resumed = loop.killed_and_resumed(text)
    assert resumed["bits"] == loop.run(text, out="whole")["bits"]
    assert [line.partition(":")[0] for line in resumed["lines"][2:]] == [
        "scheduler_2 (LinearLR) was found on the optimizer",
        "other_scheduler (StepLR) was found on the optimizer 'other'",
    ]


LATE = "scheduler = schedules.CosineAnnealingLR(optimizer, T_max=12{})"
REBUILT = {
    "before the resume, and stepped there": scheduled(
        SCHEDULES["CosineAnnealingLR"], resumed="for _ in range(step):\n    scheduler.step()"
    ),
    "after the resume": scheduled(
        SCHEDULES["CosineAnnealingLR"],
        setup="",
        resumed=LATE.format(", last_epoch=step - 1"),
    ),
    "through the values": scheduled(
        SCHEDULES["CosineAnnealingLR"],
        resumed="if step:\n    scheduler.load_state_dict(checkpointer.values)",
        after="values = scheduler.state_dict()",
    ),
    "stepped before the optimizer": scheduled(
        SCHEDULES["CosineAnnealingLR"],
        setup="import warnings\nwarnings.simplefilter('ignore')\nscheduler = "
        + SCHEDULES["CosineAnnealingLR"],
        step="scheduler.step()\noptimizer.step()",
    ),
}


@pytest.mark.parametrize("how", REBUILT)
def test_a_schedule_that_is_rebuilt_rightly_is_no_fault(how, loop):
    whole, resumed = loop.run(REBUILT[how], out="whole"), loop.killed_and_resumed(REBUILT[how])
    assert (resumed["bits"], resumed["rate"]) == (whole["bits"], whole["rate"])
    assert resumed["verdict"] == "exact"


ELSEWHERE = {
    "built after the resume, at its beginning": {"setup": "", "resumed": LATE.format("")},
    "built after the resume, with another length": {
        "setup": "",
        "resumed": LATE.format(", last_epoch=step - 1").replace("12", "12 + step"),
    },
    "stepped to another place": {"resumed": "for _ in range(2 * step):\n    scheduler.step()"},
    "gone": {"setup": "", "step": "optimizer.step()"},
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_a_schedule_that_stands_elsewhere_at_the_first_step_is_refused(how, loop):
    text = scheduled(SCHEDULES["CosineAnnealingLR"])
    again = scheduled(SCHEDULES["CosineAnnealingLR"], **ELSEWHERE[how])
    refused = loop.killed_and_resumed(text, again)
    assert refused["error"] == "StateMismatchError"
    assert "at the first step" in refused["message"] or "after resume()" in refused["message"]
    assert loop.run(text)["bits"] == loop.run(text, out="whole")["bits"]  # nothing was lost


def test_a_schedule_that_is_meant_to_be_gone_is_named(loop):
    gone = script()
    refused = loop.killed_and_resumed(scheduled(SCHEDULES["CosineAnnealingLR"]), gone)
    assert "to go on without it: resume=ResumePolicy(skip=['scheduler'])" in refused["message"]
    named = loop.run(gone.replace("**given", "resume=ResumePolicy(skip=['scheduler']), **given"))
    assert (named["began"], named["rate"]) == (SAVED, pytest.approx(0.0075))


def test_a_schedule_may_be_given_later_or_no_longer(loop):
    found = scheduled(SCHEDULES["CosineAnnealingLR"])
    whole = loop.run(found, out="whole")
    setup = f"scheduler = {SCHEDULES['CosineAnnealingLR']}\ngiven['scheduler'] = scheduler"
    given = scheduled(SCHEDULES["CosineAnnealingLR"], setup=setup)
    loop.run(found, stop=KILLED)
    loop.run(given, stop=KILLED + SAVED)
    resumed = loop.run(found)
    assert (resumed["began"], resumed["bits"]) == (2 * SAVED, whole["bits"])


def test_another_length_of_a_found_schedule_is_a_change_that_is_named(loop):
    refused = loop.killed_and_resumed(
        scheduled(SCHEDULES["CosineAnnealingLR"]),
        scheduled(SCHEDULES["CosineAnnealingLR"].replace("12", "24")),
    )
    assert "scheduler.T_max: stored 12, now 24" in refused["message"]


LOADER = "from torch.utils.data import DataLoader\nloader = DataLoader(samples, 4, shuffle=True)"
TRAINED_ON = "x = next(batches)"
EMA = """
class Ema:
    def __init__(self, model):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    def update(self, model):
        for name, p in model.named_parameters():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * p.detach()
ema = Ema(model)
"""
NOAM = """
class Noam:
    def __init__(self, optimizer):
        self.optimizer, self.n = optimizer, 0
    def step(self):
        self.n += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + self.n)
        self.optimizer.step()
noam = Noam(optimizer)
"""
NOT_GIVEN = {
    "scaler": {
        "setup": "scaler = torch.amp.GradScaler('cpu', init_scale=4.0)",
        "backward": "scaler.scale(loss).backward()",
        "step": "scaler.step(optimizer)\nscaler.update()",
    },
    "bias": {
        "setup": "bias = torch.optim.SGD([model[2].bias], lr=0.1, momentum=0.9)",
        "step": "optimizer.step()\nbias.step()",
    },
    "average": {
        "setup": "average = torch.optim.swa_utils.AveragedModel(model)",
        "after": "average.update_parameters(model)",
    },
    "teacher": {
        "setup": "import copy\nteacher = copy.deepcopy(model)",
        "after": "with torch.no_grad():\n    for one, other in zip(teacher.parameters(), "
        "model.parameters()):\n        one.data.lerp_(other.data, 0.1)",
    },
    "target": {
        "setup": "import copy\ntarget = copy.deepcopy(model)",
        "after": "if step % 2 == 0:\n    target.load_state_dict(model.state_dict())",
    },
    "ema": {"setup": EMA, "after": "ema.update(model)"},
    "noam": {"setup": NOAM, "step": "noam.step()"},
    "noise": {
        "setup": "noise = torch.Generator().manual_seed(1)",
        "before": "x = x + torch.rand(6, generator=noise)",
    },
    "rng of NumPy": {
        "setup": "import numpy as np\nrng = np.random.default_rng(1)",
        "before": "x = x * rng.random()",
    },
    "rng of Python in an object": {
        "setup": "import random\nclass Mix:\n    def __init__(self):\n        "
        "self.rng = random.Random(1)\nmix = Mix()",
        "before": "x = x * mix.rng.random()",
    },
    "rng of a closure": {
        "setup": "import numpy as np\ndef make():\n    rng = np.random.RandomState(1)\n"
        "    return lambda x: x * rng.rand()\nmix = make()",
        "before": "x = mix(x)",
    },
    "criterion": {
        "setup": "class Scaled(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('mean', torch.ones(()))\n"
        "    def forward(self, loss):\n        self.mean.lerp_(loss.detach(), 0.1)\n"
        "        return loss / self.mean\ncriterion = Scaled()",
        "backward": "criterion(loss).backward()",
    },
    "loader": {
        "setup": f"{LOADER}\nepochs = (x for _ in range(9) for x in loader)",
        "before": "x = next(epochs)",
    },
    "loader read anew for each step": {"setup": LOADER, "before": "x = next(iter(loader))"},
    "loader beside the data": {
        "setup": f"{LOADER}\nepochs = (x for _ in range(9) for x in loader)",
        "backward": "loss.backward()",
        "before": "x = torch.cat([next(epochs), x])",
    },
}


@pytest.mark.parametrize("what", NOT_GIVEN)
def test_what_training_depends_on_and_was_not_given_is_never_called_exact(what, loop):
    name = what.partition(" ")[0]
    resumed = loop.killed_and_resumed(script(**NOT_GIVEN[what]))
    assert (resumed["began"], resumed["verdict"]) == (SAVED, "not covered")
    assert resumed["lines"][0].endswith("not known to be exact")
    (line,) = [line for line in resumed["lines"] if f"{name}: not covered: " in line]
    assert "give it: " in line


STATEFUL = """
from torch.utils.data import DataLoader
class Stateful(DataLoader):
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass
batches = Stateful(samples, 4, shuffle=True)
given["batches"] = batches
"""


def test_a_loader_that_does_not_come_back_through_its_own_state_is_never_called_exact(loop):
    resumed = loop.killed_and_resumed(script(setup=STATEFUL))
    assert resumed["verdict"] == "not covered"
    (line,) = [line for line in resumed["lines"] if line.startswith("batches: not covered: ")]
    assert "give it as batch_source(batches, ...)" in line


def test_show_says_what_a_checkpoint_covers(loop, capsys):
    scheduled_by = "scheduler = schedules.StepLR(optimizer, 3)"
    text = script(**NOT_GIVEN["bias"] | {"setup": f"{scheduled_by}\n{NOT_GIVEN['bias']['setup']}"})
    loop.run(text, stop=KILLED)
    assert main(["show", str(loop.folder / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    covers = "data (MapSource), model (Sequential), optimizer (AdamW), scheduler (StepLR, found)"
    assert f"covers {covers}, random generators" in shown
    assert "not covered bias" in shown


def test_exact_resume_require_refuses_it_at_the_first_save_and_at_a_resume(loop):
    text, policy = (
        script(**NOT_GIVEN["scaler"]),
        "resume=ResumePolicy(exact_resume='require'), **given",
    )
    strict = text.replace("**given", policy)
    for again in (loop.run(strict, out="first"), loop.killed_and_resumed(text, strict)):
        assert again["error"] == "DifferenceError"
        assert "scaler: not covered: this GradScaler scales the loss" in again["message"]


def test_what_is_given_as_told_is_in_the_next_checkpoint(loop):
    text = script(**NOT_GIVEN["bias"])
    given = script(
        **NOT_GIVEN["bias"] | {"setup": NOT_GIVEN["bias"]["setup"] + "\ngiven['bias'] = bias"}
    )
    loop.run(text, stop=KILLED)
    loop.run(given, stop=KILLED + SAVED)
    resumed = loop.run(given)
    assert (resumed["began"], resumed["verdict"]) == (2 * SAVED, "exact")


QUIET = {
    "a validation loader between steps": {
        "setup": LOADER,
        "after": "for batch in loader:\n    model(batch).mean()",
    },
    "one that is left in its middle": {
        "setup": LOADER,
        "after": "for batch in loader:\n    with torch.no_grad():\n        model(batch)\n    break",
    },
    "one that is kept, in evaluation mode": {
        "setup": f"{LOADER}\nkept = (x for _ in range(9) for x in loader)",
        "after": "model.eval()\nmodel(next(kept)).mean()\nmodel.train()",
    },
    "statistics before the resume": {
        "setup": f"{LOADER}\nmean = sum(batch.mean() for batch in loader)",
    },
    "a scaler that is switched off": {
        "setup": "scaler = torch.amp.GradScaler('cpu', enabled=False)",
        "backward": "scaler.scale(loss).backward()",
        "step": "scaler.step(optimizer)\nscaler.update()",
    },
    "what the caller keeps in the values": {
        **NOT_GIVEN["average"],
        "after": "average.update_parameters(model)\nvalues = {'a': average.state_dict()}",
        "resumed": "if step:\n    average.load_state_dict(checkpointer.values['a'])",
    },
    "the best weights so far": {
        "setup": "import copy\nclass Best:\n    state, loss = None, float('inf')\nbest = Best()\n"
        "best.state = list(copy.deepcopy(list(model.parameters())))",
        "after": "if loss < best.loss:\n    best.loss = loss.item()\n"
        "    best.state = [p.detach().clone() for p in model.parameters()]",
    },
    "a learning rate that follows from the step": {
        "before": "for group in optimizer.param_groups:\n    group['lr'] = 0.01 / (1 + step)",
    },
}


@pytest.mark.parametrize("what", QUIET)
def test_an_ordinary_program_says_nothing_new(what, loop):
    text = script(**QUIET[what])
    resumed = loop.killed_and_resumed(text)
    assert (resumed["began"], resumed["verdict"]) == (SAVED, "exact")
    told = [line for line in resumed["lines"][1:] if "took over" not in line]
    assert [line for line in told if "repeated with the same bits" not in line] == []


def test_batches_that_nobody_marks_as_used_are_refused_at_the_save(loop):
    refused = loop.run(script().replace("data.used(batch)", "pass"))
    assert refused["error"] == "DataError"
    assert refused["message"].startswith("data: batches were handed out and trained on, and none")
    assert "data.used(batch)" in refused["message"]


WINDOWS = {
    "cleared with None": "optimizer.zero_grad()",
    "cleared in place": "optimizer.zero_grad(set_to_none=False)",
    "never cleared": "pass",
}


def windows(clear: str, **parts: str) -> str:
    """A loop of windows of three batches, that is saved inside of one."""
    step = f"if step % 3 == 2:\n    optimizer.step()\n    {clear}"
    return script(step=step, clear="", **parts)


@pytest.mark.parametrize("how", WINDOWS)
def test_gradients_of_an_unfinished_window_are_saved_and_restored(how, loop):
    text = windows(WINDOWS[how])
    whole, resumed = loop.run(text, out="whole"), loop.killed_and_resumed(text)
    assert (resumed["began"], resumed["verdict"]) == (SAVED, "exact")
    assert resumed["bits"] == whole["bits"]


def test_without_these_gradients_it_is_another_run(loop):
    text = windows("optimizer.zero_grad()")
    whole = loop.run(text, out="whole")
    left_out = windows("optimizer.zero_grad()", resumed="model.zero_grad()")
    assert loop.killed_and_resumed(text, left_out)["bits"] != whole["bits"]


def test_gradients_that_a_loop_clears_only_in_part_are_saved_and_restored(loop):
    text = script(backward="model[0].weight.grad = None\nloss.backward()", clear="")
    whole, resumed = loop.run(text, out="whole"), loop.killed_and_resumed(text)
    assert (resumed["began"], resumed["verdict"]) == (SAVED, "exact")
    assert resumed["bits"] == whole["bits"]


def gradients_in(folder: Path, step: int) -> list[str]:
    reader = CheckpointReader(storage_at(folder), f"checkpoint-{step}")
    return [path for path in reader.manifest.tensors if "unfinished" in path]


def test_gradients_that_nothing_uses_any_more_are_not_stored(loop):
    at_the_end, in_place = script(), script(after="model.zero_grad(set_to_none=False)")
    begin = script(backward="optimizer.zero_grad()\nloss.backward()", clear="")
    for number, text in enumerate((at_the_end, in_place, begin)):
        loop.run(text, out=str(number))
        assert gradients_in(loop.folder / str(number), SAVED) == []
    loop.run(windows("pass"), out="in a window")
    assert len(gradients_in(loop.folder / "in a window", SAVED)) == 4
