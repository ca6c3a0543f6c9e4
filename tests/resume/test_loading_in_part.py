"""`skip` names what is not loaded; all else is, and the next start has nothing to skip."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from small_trainers import PAIRS, bits, small_trainer
from unbroken.checkpoint import Checkpointer, ResumePolicy
from unbroken.errors import ConfigError, StateMismatchError
from unbroken.training import Callback


def with_head(classes: int, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(6, 8))
    model.add_module("drop", nn.Dropout(0.2))
    model.add_module("head", nn.Linear(8, classes))
    return model


def trainer_of(folder, classes: int, seed: int = 5, **settings):
    return small_trainer(folder, model=with_head(classes, seed), dataset=PAIRS, **settings)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer) -> None:
        if trainer.progress.step == self.step:
            raise RuntimeError("stopped")


NEW_HEAD = {"skip": ["head.*"], "allow": ["model.layer"]}


@pytest.fixture
def run(tmp_path):
    trainer_of(tmp_path / "run", 4, max_steps=3).train()
    return tmp_path / "run"


def test_a_head_of_another_shape_is_refused_with_both_shapes(run):
    with pytest.raises(StateMismatchError, match=r"head\.weight.*\[4, 8\].*\[7, 8\]"):
        trainer_of(run, 7).train()


def test_a_skipped_head_keeps_its_own_weights_and_all_else_is_loaded(run):
    old = trainer_of(run, 4, max_steps=3)
    old.train()
    new = trainer_of(run, 7, seed=9, max_steps=3, **NEW_HEAD)
    report = new.load_checkpoint()
    assert bits(new.model)["body.weight"] == bits(old.model)["body.weight"]
    assert bits(new.model)["head.weight"] == bits(with_head(7, seed=9))["head.weight"]
    assert new.optimizer.state[new.model.body.weight]["step"].item() == 3
    assert new.model.head.weight not in new.optimizer.state
    assert {"model.head.weight", "optimizer.head.weight"} <= {d.path for d in report.differences}
    new.checkpointer.close()


def test_the_same_command_skips_once(run, tmp_path):
    shutil.copytree(run, tmp_path / "whole")
    shutil.copytree(run, tmp_path / "stopped")
    command = {"classes": 7, "max_steps": 8, "save_steps": 2, **NEW_HEAD}
    whole = trainer_of(tmp_path / "whole", **command)
    whole.train()
    stopped = trainer_of(tmp_path / "stopped", **command, trainer={"callbacks": [StopAt(5)]})
    with pytest.raises(RuntimeError, match="stopped"):
        stopped.train()
    again = trainer_of(tmp_path / "stopped", **command)
    assert again.train().resume_report.step == 4
    assert bits(again.model) == bits(whole.model)


def test_a_pattern_that_fits_nothing_is_an_error(run):
    with pytest.raises(ConfigError, match=r"skip=\['haed\.\*'\].*fits nothing"):
        trainer_of(run, 4, skip=["haed.*"]).train()


def test_an_optimizer_that_is_skipped_begins_anew(run):
    new = trainer_of(run, 4, skip=["optimizer"])
    new.load_checkpoint()
    assert not new.optimizer.state
    new.checkpointer.close()


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, trainer) -> None:
        self.seen.append(trainer.optimizer.param_groups[0]["lr"])


NEW_SETTINGS = [{}, {"learning_rate": 0.003}, {"warmup_steps": 1}]


@pytest.mark.parametrize("settings", NEW_SETTINGS, ids=str)
def test_a_schedule_that_is_skipped_begins_anew_whatever_else_changed(settings, run, tmp_path):
    def rates(folder, **more):
        seen = Rates()
        trainer_of(
            folder, 4, max_steps=8, trainer={"callbacks": [seen]}, **settings, **more
        ).train()
        return seen.seen

    again = rates(run, skip=["scheduler"], allow=[*settings])
    assert again == rates(tmp_path / "fresh")[:5]


def test_a_loop_of_ones_own_skips_too(tmp_path):
    old, new = with_head(4), with_head(7, seed=9)
    with Checkpointer(tmp_path, model=old) as checkpointer:
        checkpointer.save(1)
    with Checkpointer(
        tmp_path, resume=ResumePolicy(("model",), ("head.*",)), model=new
    ) as checkpointer:
        assert checkpointer.resume().step == 1
    assert bits(new)["body.weight"] == bits(old)["body.weight"]


def test_tied_weights_cannot_be_skipped_by_half(tmp_path):
    def tied():
        model = with_head(6)
        model.body = nn.Linear(8, 6)
        model.body.weight = model.head.weight = nn.Parameter(torch.ones(6, 8))
        return model

    with Checkpointer(tmp_path, model=tied()) as checkpointer:
        checkpointer.save(1)
    again = Checkpointer(tmp_path, resume=ResumePolicy((), ("head.*",)), model=tied())
    with again, pytest.raises(StateMismatchError, match=r"body\.weight: is tied to a tensor"):
        again.resume()
