"""A kill between two lines of the log: the next line tells of all steps since the last one."""

from __future__ import annotations

import pytest

from scenarios import metrics
from small_trainers import small_trainer
from unbroken.training import Callback
from unbroken.training.run_state import Statistics

STEPS = 9


class Dies(Callback):
    """Ends the process, as far as the run can tell, after a step that is saved."""

    after: int | None = None

    def on_save(self, trainer, checkpoint):
        if trainer.progress.step == Dies.after:
            raise KeyboardInterrupt


def train(folder, **settings) -> None:
    settings = {"max_steps": STEPS, "logging_steps": 3, "save_steps": 1, **settings}
    parts = {"callbacks": [Dies()]}
    small_trainer(folder, trainer=parts, log_data_digest=True, **settings).train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return metrics(folder)


@pytest.mark.parametrize("dies_after", [(1,), (2,), (4, 5), (3, 7, 8)], ids=str)
def test_the_lines_are_those_of_the_uninterrupted_run(dies_after, whole, tmp_path, monkeypatch):
    for step in dies_after:
        monkeypatch.setattr(Dies, "after", step)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    monkeypatch.setattr(Dies, "after", None)
    train(tmp_path)
    assert [line["step"] for line in whole] == [3, 6, 9]
    assert metrics(tmp_path) == whole


def test_the_mean_of_three_steps_is_not_that_of_the_last_ones(whole, tmp_path):
    """The negative control: a line that forgot steps is another one."""
    train(tmp_path, logging_steps=1)
    each = [line["loss"] for line in metrics(tmp_path)]
    assert whole[0]["loss"] == sum(each[:3]) / 3
    assert whole[0]["loss"] not in (each[2], sum(each[1:3]) / 3, sum(each[1:3]) / 2)


def test_statistics_come_back_whole():
    full = Statistics()
    for number, name in enumerate(vars(full), 1):
        setattr(full, name, str(number) if name == "data_digest" else number)
    again = Statistics()
    again.load_state_dict(full.state_dict())
    assert vars(again) == vars(full)
