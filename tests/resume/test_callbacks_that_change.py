"""Callbacks that come, go, or are built with other values: told, and in effect."""

from __future__ import annotations

import pytest
import torch

from small_trainers import small_model, small_trainer
from unbroken.checkpoint import Checkpointer, ResumePolicy
from unbroken.errors import DifferenceError
from unbroken.training import Callback


class Plan:
    def __init__(self, patience: int) -> None:
        self.patience = patience


class StopAfter(Callback):
    """Stops after some steps; a number, an object, and a state that holds them too."""

    def __init__(self, steps: int, patience: int = 9) -> None:
        self.steps, self.plan, self.count = steps, Plan(patience), 0

    def on_step_end(self, trainer) -> None:
        self.count += 1
        if self.count >= min(self.steps, self.plan.patience):
            trainer.stop("enough")


class StopAfterWithState(StopAfter):
    def state_dict(self) -> dict:
        return {"steps": self.steps, "patience": self.plan.patience, "count": self.count}

    def load_state_dict(self, state) -> None:
        self.steps, self.count = state["steps"], state["count"]
        self.plan.patience = state["patience"]


def run(folder, *callbacks, **settings):
    settings = {"max_steps": 9, "save_steps": 1, **settings}
    trainer = small_trainer(folder, trainer={"callbacks": callbacks}, **settings)
    return trainer.train()


@pytest.mark.parametrize("kind", [StopAfter, StopAfterWithState])
def test_new_values_of_a_callback_count_and_what_it_has_counted_is_kept(kind, tmp_path):
    assert run(tmp_path, kind(3)).progress.step == 3
    assert run(tmp_path, kind(3)).progress.step == 3
    longer = run(tmp_path, kind(5))
    assert longer.progress.step == 5
    assert "steps: stored 3, now 5" in "\n".join(longer.resume_report.lines())
    assert longer.resume_report.verdict == "equivalent"
    in_an_object = run(tmp_path, kind(9, patience=7))
    assert in_an_object.progress.step == 7
    assert run(tmp_path, kind(9, patience=7)).resume_report.verdict == "exact"


def test_a_run_goes_on_without_the_callback_that_ended_it(tmp_path):
    run(tmp_path, StopAfter(3))
    gone = run(tmp_path)
    assert gone.progress.step == 9
    assert "callbacks.names" in "\n".join(gone.resume_report.lines())


@pytest.mark.parametrize("way", ["allow", "skip"])
@pytest.mark.parametrize("name", ["callbacks", "callbacks.0-StopAfterWithState"])
def test_a_stateful_callback_comes_and_goes_by_the_name_in_the_message(name, way, tmp_path):
    named, stop = {way: [name]}, StopAfterWithState(99)
    run(tmp_path, max_steps=2)
    with pytest.raises(DifferenceError, match=r"callbacks\.0-StopAfterWithState") as came:
        run(tmp_path, stop)
    assert "allow=['callbacks.0-StopAfterWithState']" in came.value.hint
    told = run(tmp_path, stop, max_steps=4, **named).resume_report
    assert told.verdict == "changed"
    with pytest.raises(DifferenceError, match="removed"):
        run(tmp_path, max_steps=6)
    assert run(tmp_path, max_steps=6, **named).resume_report.verdict == "changed"


def test_objects_of_a_loop_come_and_go_by_name(tmp_path):
    def save(step: int, allow=(), **callbacks):
        policy, model = ResumePolicy(allow=allow), small_model()
        with Checkpointer(tmp_path, resume=policy, model=model, callbacks=callbacks) as one:
            report = one.resume()
            one.save(step)
            return report

    save(1, first=torch.Generator())
    with pytest.raises(DifferenceError, match=r"callbacks\.second"):
        save(2, first=torch.Generator(), second=torch.Generator())
    save(2, ["callbacks.second"], first=torch.Generator(), second=torch.Generator())
    assert save(3, ["callbacks"], second=torch.Generator()).verdict == "changed"
