"""What a subclass of the Trainer trains by, in a module of the user's: changed, it is refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from torch import nn

from small_trainers import PAIRS, small_model
from unbroken import DifferenceError
from unbroken.training import NoDisplay, TrainerConfig

MODULE = '''
from unbroken import Trainer

SHRINK = 1.0


def shrunk(weight):
    return weight * SHRINK


class Shrinking(Trainer):
    """Makes weights smaller after each step."""

    def __init__(self, *arguments, every=1, **options):
        super().__init__(*arguments, **options)
        self.every, self.steps, self.best = every, 0, None

    def call(self, hook, *arguments):
        if hook == "on_step_end":
            self.steps += 1
            if self.steps % self.every == 0:
                for weight in self.model.parameters():
                    weight.data.copy_(shrunk(weight.data))
        super().call(hook, *arguments)

    def evaluate(self):
        return {"eval_loss": super().evaluate()["eval_loss"] * 1}

    def record(self, record):
        super().record(record)
'''
CHANGES_TRAINING = {
    "its code": ("self.steps += 1", "self.steps += 2", "trainer.source.Shrinking"),
    "a function that it calls": ("weight * SHRINK", "weight / SHRINK", "trainer.source.Shrinking"),
    "a global": ("SHRINK = 1.0", "SHRINK = 0.9", "SHRINK: stored 1.0, now 0.9"),
    "a setting": ("every=1", "every=2", "trainer.values.every: stored 1, now 2"),
}
CHANGES_NOTHING = {
    "nothing": ("", ""),
    "a docstring": ("Makes", "Multiplies"),
    "what is logged": ("super().record(record)", "super().record({**record})"),
    "evaluations that steer nothing": ('["eval_loss"] * 1', '["eval_loss"] * 2'),
    "what nothing uses": (", self.best = every, 0, None", ", self.best = every, 0, 1"),
}
STEERED = {"lr_scheduler_type": "reduce_lr_on_plateau"}


def trained(folder: Path, steps: int, edit: tuple[str, str] = ("", ""), **settings):
    """Train with a subclass of a module as it is after an edit."""
    assert edit == ("", "") or MODULE.count(edit[0]) == 1
    text, path = MODULE.replace(*edit) if edit[0] else MODULE, folder / "shrinking.py"
    path.write_text(text)
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location("shrinking", path)
    )
    sys.modules["shrinking"] = module
    try:
        exec(compile(text, str(path), "exec"), vars(module))
        settings = {"lr_scheduler_type": "constant", "eval_steps": 1, **settings}
        config = TrainerConfig(
            output_dir=str(folder / "run"), max_steps=steps, save_steps=2, **settings
        )
        data = {"train_dataset": PAIRS, "eval_dataset": PAIRS[:8], "loss_fn": nn.CrossEntropyLoss()}
        trainer = module.Shrinking(small_model(), config, display=NoDisplay(), **data)
        trainer.train()
    finally:
        del sys.modules["shrinking"]
    return trainer


@pytest.mark.parametrize("edit", CHANGES_TRAINING.values(), ids=CHANGES_TRAINING)
def test_what_a_subclass_of_our_trainer_trains_by_is_compared(edit, tmp_path):
    trained(tmp_path, 2)
    *change, named = edit
    with pytest.raises(
        DifferenceError, match="the subclass of Trainer trains otherwise"
    ) as refused:
        trained(tmp_path, 4, change)
    assert named in str(refused.value)
    assert trained(tmp_path, 4, change, allow=["trainer"]).resume_report.step == 2


@pytest.mark.parametrize("edit", CHANGES_NOTHING.values(), ids=CHANGES_NOTHING)
def test_what_no_step_of_a_subclass_of_our_trainer_uses_may_change(edit, tmp_path):
    trained(tmp_path, 2)
    again = trained(tmp_path, 4, edit)
    assert (again.resume_report.step, again.resume_report.verdict) == (2, "exact")
    assert again.steps == 4


def test_evaluations_of_a_subclass_are_compared_where_they_steer_the_learning_rate(tmp_path):
    trained(tmp_path, 2, **STEERED)
    assert trained(tmp_path, 4, **STEERED).resume_report.verdict == "exact"
    with pytest.raises(DifferenceError, match=r"trainer\.source\.Shrinking"):
        trained(tmp_path, 6, CHANGES_NOTHING["evaluations that steer nothing"], **STEERED)
