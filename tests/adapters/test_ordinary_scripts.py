"""Ordinary scripts around the drop-in resume as exact, and nothing new is said."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from quiet.programs import HOST, OF_THE_DROP_IN
from quiet.running import KILLED_AT, SAVED_AT, resumes_exactly, run


@pytest.fixture(scope="module")
def by_server(server):
    def start(script: str, folder: str, kill_at: int) -> list[int]:
        paths = {"script": script, "run": folder, "folder": str(Path(folder).parent)}
        what = {"module": "quiet.running", "action": "start_by", "kill_at": kill_at}
        return [server.run({**what, **paths, "log": f"{script}.log"})]

    return start


@pytest.mark.parametrize("program", OF_THE_DROP_IN.values(), ids=OF_THE_DROP_IN)
def test_a_script_resumes_exactly_and_nothing_is_said(program, by_server, tmp_path):
    resumes_exactly(HOST + program, tmp_path, by_server)


SUBCLASS = HOST + OF_THE_DROP_IN["a subclass with a loss and a step of its own"]
LOSS = "F.cross_entropy(logits, labels, weight=self.class_weights)"
STEP = "loss = super().training_step(model, inputs, num_items_in_batch)"
CHANGES_TRAINING = {
    "weights of classes": ("[1.0, 2.0, 1.0]", "[1.0, 5.0, 1.0]", "trainer.values.class_weights"),
    "a loss": (LOSS, "F.multi_margin_loss(logits, labels)", "trainer.source"),
    "a step": (STEP, STEP.replace("super", "0.5 * super"), "trainer.source"),
    "a global": (LOSS, f"{LOSS} * len(SETTINGS)", "trainer."),
}
CHANGES_NOTHING = {
    "a comment": (STEP, f"{STEP}  # of the host"),
    "a docstring": (
        "class WeightedTrainer(Trainer):",
        'class WeightedTrainer(Trainer):\n    """Mine."""\n',
    ),
    "a log of its own": (
        "    def training_step",
        "    def log(self, *arguments):\n        super().log(*arguments)\n\n    def training_step",
    ),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, by_server):
    folder = tmp_path_factory.mktemp("killed")
    assert run(SUBCLASS, folder, KILLED_AT, how=by_server)["status"] == -signal.SIGKILL
    return folder / "run"


def again(killed, folder, by_server, old: str, new: str) -> dict:
    """Start the script again, edited."""
    shutil.copytree(killed, folder / "run")
    return run(edited(SUBCLASS, (old, new)), folder, how=by_server)


@pytest.mark.parametrize("edit", CHANGES_TRAINING.values(), ids=CHANGES_TRAINING)
def test_what_a_subclass_trains_by_is_compared(edit, killed, by_server, tmp_path):
    found = again(killed, tmp_path, by_server, *edit[:2])
    assert found.get("error") == "DifferenceError", found
    assert edit[2] in found["message"]


READS_A_VARIABLE = f"{LOSS} * float(os.environ['SCALE_OF_IT']) * (2.0 if KIND == 'a' else 1.0)"
AROUND_IT = {
    "a variable": ("'] = '1'", "'] = '2'", "trainer.globals.WeightedTrainer.environ.SCALE_OF_IT"),
    "a text in a global": ("KIND = 'a'", "KIND = 'b'", "trainer.globals.WeightedTrainer.KIND"),
}


@pytest.mark.parametrize("edit", AROUND_IT.values(), ids=AROUND_IT)
def test_a_variable_and_a_text_that_a_subclass_trains_by_are_compared(edit, by_server, tmp_path):
    begin = "os.environ['SCALE_OF_IT'] = '1'\nKIND = 'a'\n\nmodel = Net()"
    script = edited(SUBCLASS, ("\nmodel = Net()", f"\n{begin}"), (LOSS, READS_A_VARIABLE))
    assert run(script, tmp_path, KILLED_AT, how=by_server)["status"] == -signal.SIGKILL
    found = run(edited(script, edit[:2]), tmp_path, how=by_server)
    assert found.get("error") == "DifferenceError", found
    assert edit[2] in found["message"]


@pytest.mark.parametrize("edit", CHANGES_NOTHING.values(), ids=CHANGES_NOTHING)
def test_what_no_step_of_a_subclass_uses_may_change(edit, killed, by_server, tmp_path):
    found = again(killed, tmp_path, by_server, *edit)
    assert found.get("step") == SAVED_AT, found
    assert [line.partition(":")[0] for line in found["differences"]] == ["code.script_digest"]


def test_a_step_that_calls_no_step_of_the_host_resumes_exactly(by_server, tmp_path):
    own = [
        *("model.train()", "loss = self.compute_loss(model, inputs)"),
        *("self.accelerator.backward(loss)", "loss = loss.detach()"),
    ]
    assert SUBCLASS.count(STEP) == 1
    resumes_exactly(SUBCLASS.replace(STEP, "; ".join(own)), tmp_path, by_server)


def test_a_run_that_a_callback_ended_says_so_when_it_is_started_again(by_server, tmp_path):
    patient = "early_stopping_patience=50"
    assert SUBCLASS.count(patient) == 1
    program = SUBCLASS.replace(patient, "early_stopping_patience=1, early_stopping_threshold=9")
    ended, again = (run(program, tmp_path, how=by_server) for _ in range(2))
    assert (again["step"], again["verdict"]) == (SAVED_AT, "exact"), again
    assert again["digest"] == ended["digest"]
    lines = [line for line in again["output"].splitlines() if "nothing to do" in line]
    assert [f"at step {SAVED_AT} of" in one for one in lines] == [True], again
    assert "already (a callback ended the run); nothing to do" in lines[0]


MEASURED = (
    "eval_dataset=rows[:7],",
    "eval_dataset=rows[:7], compute_metrics=lambda _: {'one': 1},",
)
BEST = """load_best_model_at_end=True,
    metric_for_best_model="loss", """
PATIENCE = "EarlyStoppingCallback(early_stopping_patience=50), "
OWN = """class Listens(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        control.should_training_stop = metrics["eval_loss"] < 0


model = Net()"""
CHOOSES = {
    "the best and when to stop": (),
    "the best": ((PATIENCE, ""),),
    "by a metric": ((PATIENCE, ""), ("load_best_model_at_end=True,", "")),
    "by a callback": ((BEST, ""), (PATIENCE, "Listens(), "), ("model = Net()", OWN)),
}
CHANGES_WHAT_IS_CHOSEN = {
    "data": ("rows[:7]", "rows[:6]", "eval_data.length: stored 7, now 6"),
    "metrics": ("{'one': 1}", "{'one': 2}", "eval_data.metrics.source"),
    "a loader of its own": ("self.eval_dataset, 3", "self.eval_dataset, 4", "eval_data.trainer"),
}


def edited(script: str, *edits: tuple[str, str]) -> str:
    for old, new in edits:
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


def resumed_with_another(
    edit: tuple[str, str], folder: Path, by_server, script: str = SUBCLASS
) -> dict:
    assert run(script, folder, KILLED_AT, how=by_server)["status"] == -signal.SIGKILL
    return run(edited(script, edit), folder, how=by_server)


@pytest.mark.parametrize("edit", CHANGES_WHAT_IS_CHOSEN.values(), ids=CHANGES_WHAT_IS_CHOSEN)
@pytest.mark.parametrize("chooses", CHOOSES.values(), ids=CHOOSES)
def test_other_evaluations_that_choose_are_never_called_exact(chooses, edit, by_server, tmp_path):
    script = edited(SUBCLASS, MEASURED, *chooses)
    found = resumed_with_another(edit[:2], tmp_path, by_server, script)
    assert (found.get("step"), found.get("verdict")) == (SAVED_AT, "equivalent"), found
    told = [line for line in found["differences"] if line.startswith(edit[2])]
    assert [": equivalent: other evaluations" in line for line in told] == [True], found


def test_other_evaluations_that_nothing_follows_are_no_difference(by_server, tmp_path):
    script = edited(SUBCLASS, (BEST, ""), (PATIENCE, ""))
    found = resumed_with_another(("rows[:7]", "rows[:6]"), tmp_path, by_server, script)
    assert found.get("step") == SAVED_AT, found
    assert [line.partition(":")[0] for line in found["differences"]] == ["code.script_digest"]


STEERED = SUBCLASS.replace(
    "**SETTINGS, eval_strategy",
    "**{**SETTINGS, 'lr_scheduler_type': 'reduce_lr_on_plateau'}, eval_strategy",
).replace("eval_dataset=rows[:7],", "eval_dataset=rows[:7], compute_metrics=lambda _: {'one': 1},")
CHANGES_EVALUATIONS = {
    "data": ("rows[:7]", "rows[:6]", "eval_data.length: stored 7, now 6"),
    "metrics": ("{'one': 1}", "{'one': 2}", "eval_data.metrics.source"),
    "a loader of its own": ("self.eval_dataset, 3", "self.eval_dataset, 4", "trainer.source"),
}


@pytest.fixture(scope="module")
def steered(tmp_path_factory, by_server):
    folder = tmp_path_factory.mktemp("steered")
    assert STEERED.count("reduce_lr_on_plateau") == STEERED.count("compute_metrics") == 1
    assert run(STEERED, folder, KILLED_AT, how=by_server)["status"] == -signal.SIGKILL
    return folder / "run"


@pytest.mark.parametrize("edit", CHANGES_EVALUATIONS.values(), ids=CHANGES_EVALUATIONS)
def test_evaluations_are_compared_where_they_steer_the_learning_rate_of_the_host(
    edit, steered, by_server, tmp_path
):
    shutil.copytree(steered, tmp_path / "run")
    found = run(STEERED.replace(*edit[:2]), tmp_path, how=by_server)
    assert found.get("error") == "DifferenceError", found
    assert edit[2] in found["message"]


def test_the_same_evaluations_steer_the_same_learning_rate(steered, by_server, tmp_path):
    shutil.copytree(steered, tmp_path / "run")
    found = run(STEERED, tmp_path, how=by_server)
    assert (found["verdict"], found["step"], found["differences"]) == ("exact", SAVED_AT, []), found
