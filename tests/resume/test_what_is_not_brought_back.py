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
    assert "its load_state_dict did not bring it back" in str(report.differences[0])


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
    assert any("count" in one and "did not bring it back" in one for one in found), found
