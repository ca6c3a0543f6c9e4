"""Attributes that training changes come back, and what cannot come back is named."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from threading import Lock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import attribute_runs
from fresh import run_fresh
from small_trainers import PAIRS
from unbroken.checkpoint import Checkpointer
from unbroken.cli.show import print_run
from unbroken.errors import DifferenceError
from unbroken.training import NoDisplay, Trainer, TrainerConfig

HARM = {"by hand": attribute_runs.loop, "with our Trainer": attribute_runs.own}


def finished(run, folder: Path, *arguments) -> dict:
    assert run_fresh(run, str(folder), *arguments) == 0
    return json.loads(Path(f"{folder}.json").read_text())


@pytest.mark.parametrize("run", HARM.values(), ids=HARM)
def test_attributes_that_training_changes_come_back(run, tmp_path):
    whole = finished(run, tmp_path / "whole")
    for name in ("killed", "forgotten"):
        assert run_fresh(run, str(tmp_path / name), 4) == -signal.SIGKILL
    resumed = finished(run, tmp_path / "killed")
    assert resumed["seen"] == whole["seen"]
    assert [line.rpartition(": ")[2] for line in resumed["report"][:1]] == ["exact"]
    assert finished(run, tmp_path / "forgotten", 0, True)["seen"] != whole["seen"]


def test_a_setting_of_the_user_wins_over_what_training_made_of_the_old_one(tmp_path):
    assert run_fresh(attribute_runs.own, str(tmp_path / "run"), 4) == -signal.SIGKILL
    assert run_fresh(attribute_runs.own, str(tmp_path / "run"), 0, False, 0, 9) == 1
    allowed = finished(allowing_another_level, tmp_path / "run")
    assert "data.values.Curriculum.level: stored 0, now 9: changed" in "\n".join(allowed["report"])


def allowing_another_level(folder: str) -> None:
    attribute_runs.own(folder, level=9, allow=["data"])


class Cooling(nn.Linear):
    """A layer with a temperature, and whatever a test gives it."""

    def __init__(self, **more) -> None:
        super().__init__(4, 4)
        self.temperature = 1.0
        vars(self).update(more)

    def cool(self) -> None:
        self.temperature *= 0.5


def saved(folder, step: int, layer: Cooling, **objects):
    """Resume a layer, cool it to a step, and save it; return what the resume said."""
    with Checkpointer(folder, model=layer, **objects) as checkpointer:
        report = checkpointer.resume()
        for _ in range(report.step, step):
            layer.cool()
        checkpointer.save(step)
        return report


def test_a_second_start_in_the_same_process_is_no_change_of_a_setting(tmp_path):
    layer = Cooling()
    saved(tmp_path, 2, layer)
    layer.cool()  # a step that no checkpoint has
    assert saved(tmp_path, 3, layer).verdict == "exact"
    assert layer.temperature == 0.5**3


def test_what_says_where_and_when_a_process_runs_is_not_saved(tmp_path):
    layer = Cooling()
    saved(tmp_path, 1, layer)
    layer.rank, layer.port, layer.device_name, layer.local_pid = 3, 29500, "cuda:1", os.getpid()
    layer.began, layer.t0 = time.time(), time.perf_counter()
    layer.file, layer.lock = sys.stdin, Lock()
    layer.folder, layer.log = "/tmp/somewhere", logging.getLogger("x")
    layer.temperature = 0.25
    saved(tmp_path, 2, layer)
    state = json.loads((tmp_path / "checkpoint-2/state.json").read_text())
    assert list(state["attributes"]["plain"]) == ["model.temperature"]


def test_a_value_that_cannot_be_judged_is_one_line_and_changes_no_verdict(tmp_path, capsys):
    layer = Cooling()
    saved(tmp_path, 1, layer)
    layer.pages = iter([1, 2])
    saved(tmp_path, 2, layer)
    assert saved(tmp_path, 3, Cooling()).verdict == "exact"
    print_run(str(tmp_path / "checkpoint-2"), with_history=False, as_json=False)
    assert "model.pages (a builtins.list_iterator)" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_saved_is_named_and_never_called_exact(tmp_path):
    layer = Cooling()
    saved(tmp_path, 1, layer)
    vars(layer)["average"] = copy.deepcopy(layer)
    saved(tmp_path, 2, layer)
    report = saved(tmp_path, 3, Cooling())
    assert "model.average: not covered: training changed it" in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: itertools.count(1), "itertools.count"),
        (lambda: itertools.cycle([1, 2]), "itertools.cycle"),
        (lambda: (0.5**n for n in range(9)), "builtins.generator"),
        (lambda: iter([1, 2, 3]), "builtins.list_iterator"),
        (lambda: iter(DataLoader([1, 2, 3])), "_SingleProcessDataLoaderIter"),
    ],
    ids=("count", "cycle", "generator", "list", "loader"),
)
def test_an_iterator_that_training_reads_on_is_named(make, kind, tmp_path):
    layer = Cooling(steps=make())
    saved(tmp_path, 1, layer)
    assert saved(tmp_path, 1, layer).verdict == "exact"
    next(layer.steps)
    saved(tmp_path, 2, layer)
    found = "\n".join(saved(tmp_path, 3, Cooling(steps=make())).lines())
    assert "model.steps: not covered: training changed it" in found
    assert f"{kind}; keep a number in its stead" in found


def test_results_with_a_graph_and_caches_are_no_hindrance(tmp_path):
    layer = Cooling(last=None, mask=None, weights=None)
    saved(tmp_path, 1, layer)
    layer.last, layer.mask = layer(torch.ones(400_000, 4)), torch.ones(3, 3)
    layer.weights = list(layer.parameters())
    saved(tmp_path, 2, layer)
    again = Cooling(last=None, mask=None, weights=None)
    assert saved(tmp_path, 2, again).verdict == "exact"
    assert (again.last, tuple(again.mask.shape)) == (None, (3, 3))


def test_an_attribute_that_is_no_more_is_a_line(tmp_path):
    saved(tmp_path, 1, Cooling(), meter=attribute_runs.Meter())
    meter = attribute_runs.Meter()
    saved(tmp_path, 1, Cooling(), meter=meter)
    meter.add(1)
    saved(tmp_path, 2, Cooling(), meter=meter)
    assert "meter.sum" in "\n".join(saved(tmp_path, 3, Cooling()).lines())


class Pulled(Trainer):
    """Keeps a number that training changes, and gives its state itself."""

    start = 0

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.pulls, self.left = 0, self.start

    def state_dict(self) -> dict:
        return {"pulls": self.pulls}

    def load_state_dict(self, state) -> None:
        self.pulls = state["pulls"]

    def save_checkpoint(self) -> str:
        self.pulls, self.left = self.pulls + 1, self.left + 2
        return super().save_checkpoint()


def pulled(folder, steps: int, **settings) -> Pulled:
    config = TrainerConfig(output_dir=str(folder), max_steps=steps, save_steps=1, **settings)
    loss = nn.CrossEntropyLoss()
    trainer = Pulled(nn.Linear(6, 4), config, PAIRS, loss_fn=loss, display=NoDisplay())
    trainer.train()
    return trainer


def test_a_state_that_a_subclass_of_our_trainer_gives_comes_back_and_wins(tmp_path, monkeypatch):
    settings = {"lr_scheduler_type": "constant"}
    pulled(tmp_path, 2, **settings)
    again = pulled(tmp_path, 4, **settings)
    assert (again.pulls, again.left, again.resume_report.verdict) == (
        5,
        10,
        "exact",
    )  # one at the start, too
    monkeypatch.setattr(Pulled, "start", 100)
    with pytest.raises(DifferenceError, match=r"trainer\.left: stored 0, now 100"):
        pulled(tmp_path, 6, **settings)
    assert pulled(tmp_path, 6, allow=["trainer"], **settings).left == 100 + 4
