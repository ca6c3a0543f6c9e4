"""An object whose `load_state_dict` forgets a part of its state is never called exact."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from small_trainers import small_trainer
from unbroken import Callback, Checkpointer, ResumePolicy
from unbroken.errors import DifferenceError


class Kept:
    """Holds values, and takes back those that it does not forget."""

    forgets = ()

    def __init__(self) -> None:
        self.values = {
            "count": 0,
            "rate": 0.5,
            "name": "first",
            "rows": [1],
            "none": None,
            "tensor": torch.zeros(3),
            "large": torch.zeros(1 << 18),
            "inner": {"best": 1.0},
        }

    def move(self) -> None:
        self.values["count"] += 1
        self.values["rate"] /= 2
        self.values["name"] += "!"
        self.values["rows"].append(2)
        self.values["none"] = 3
        self.values["tensor"][1] += 1
        self.values["large"] += 1
        self.values["inner"]["best"] -= 0.1

    def state_dict(self):
        return self.values

    def load_state_dict(self, state) -> None:
        self.values |= {name: one for name, one in state.items() if name not in self.forgets}


class Clock(Kept):
    """Tells the time in its state."""

    def state_dict(self):
        return {**self.values, "at": time.perf_counter()}


class Counter(Kept, Callback):
    """The same as a callback."""

    def on_step_end(self, trainer) -> None:
        self.move()


def resumed(folder, kept, **more):
    """Save after three moves, and resume with another one that is as this one is."""
    first = type(kept)()
    model = nn.Linear(2, 2)
    with Checkpointer(folder, model=model, kept=first, tell=None) as saving:
        saving.resume()
        for _ in range(3):
            first.move()
        saving.save(3)
    with Checkpointer(folder, model=model, kept=kept, tell=None, **more) as again:
        return again.resume()


@pytest.mark.parametrize("name", Kept().values)
def test_a_part_that_is_forgotten_is_named(name, tmp_path):
    kept = Kept()
    kept.forgets = (name,)
    report = resumed(tmp_path, kept)
    assert report.verdict == "not covered"
    assert [one.path.split(".")[:2] for one in report.differences] == [["kept", name]]
    assert "its load_state_dict did not take it back" in str(report.differences[0])


@pytest.mark.parametrize("kind", [Kept, Clock])
def test_what_takes_all_back_is_exact_and_so_is_a_clock(kind, tmp_path):
    assert resumed(tmp_path, kind()).verdict == "exact"


def test_another_type_of_a_tensor_is_told(tmp_path):
    class Halved(Kept):
        def load_state_dict(self, state) -> None:
            self.values |= {**state, "tensor": state["tensor"].half()}

    report = resumed(tmp_path, Halved())
    assert [one.path for one in report.differences] == ["kept.tensor"]


def test_where_exact_is_required_it_is_refused(tmp_path):
    kept = Kept()
    kept.forgets = ("count",)
    with pytest.raises(DifferenceError, match=r"kept\.count"):
        resumed(tmp_path, kept, resume=ResumePolicy(exact_resume="require"))


def test_a_callback_of_a_trainer_is_looked_at_too(tmp_path):
    small_trainer(tmp_path, trainer={"callbacks": [Counter()]}).train()
    forgetful = Counter()
    forgetful.forgets = ("count",)
    again = small_trainer(tmp_path, trainer={"callbacks": [forgetful]}, max_steps=8)
    found = [str(one) for one in again.train().resume_report.differences]
    assert any("count" in one and "did not take it back" in one for one in found), found


class Remembers(nn.Linear):
    """A module with more than tensors in its state."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen, self.noted = 0, 0

    def get_extra_state(self):
        return {"seen": self.seen, "noted": self.noted}

    def set_extra_state(self, state) -> None:
        self.seen = state["seen"]


class Counts(torch.optim.SGD):
    """An optimizer that counts what it keeps to itself."""

    counted = 0

    def step(self, closure=None):
        self.counted += 1
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "counted": self.counted}

    def load_state_dict(self, state) -> None:
        super().load_state_dict({name: one for name, one in state.items() if name != "counted"})


class Falls(torch.optim.lr_scheduler.LRScheduler):
    """A schedule that forgets how far it fell."""

    height = 8

    def get_lr(self):
        self.height -= 1
        return [0.01 for _ in self.base_lrs]

    def load_state_dict(self, state) -> None:
        super().load_state_dict({name: one for name, one in state.items() if name != "height"})


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model", "model.0.extra_state.noted"),
        ("optimizer", "optimizer.counted"),
        ("scheduler", "scheduler.height"),
    ],
)
def test_what_a_class_of_torch_was_extended_by_is_looked_at_too(name, path, tmp_path):
    def objects() -> dict:
        model = nn.Sequential(Remembers() if name == "model" else nn.Linear(2, 2))
        kind = Counts if name == "optimizer" else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=0.01)
        schedule = Falls if name == "scheduler" else torch.optim.lr_scheduler.ConstantLR
        return {"model": model, "optimizer": optimizer, "scheduler": schedule(optimizer)}

    with Checkpointer(tmp_path, tell=None, **(first := objects())) as saving:
        saving.resume()
        first["model"](torch.ones(1, 2)).sum().backward()
        first["optimizer"].step()
        first["scheduler"].step()
        if name == "model":
            first["model"][0].seen = first["model"][0].noted = 3
        saving.save(1)
    with Checkpointer(tmp_path, tell=None, **objects()) as again:
        report = again.resume()
    assert [one.path for one in report.differences] == [path], report.differences
