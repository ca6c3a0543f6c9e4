"""A branch goes on from a moment of another run, exactly, and is a run like any other from then."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from branch_scenarios import BRANCH, LEAVES_AT, LOWER, NAME, STEPS, child_of, train_fresh
from scenarios import metrics, outcome
from small_trainers import bits, small_trainer, steps_in
from unbroken import Checkpointer
from unbroken.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DifferenceError,
    LockHeldError,
    RunDirectoryError,
)
from unbroken.storage import MemoryStorage
from unbroken.store import RunDirectory
from unbroken.training import TrainerConfig

# The same bits, in fresh processes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 15 steps that nothing interrupted; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished")
    assert train_fresh(folder, {}) == 0
    return folder


@pytest.fixture
def parent(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def lower(finished, tmp_path_factory):
    """What an uninterrupted branch with a lower learning rate ends with."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("lower") / "run")
    assert train_fresh(folder, LOWER) == 0
    return outcome(child_of(folder), STEPS)


def starts_of(folder):
    events = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [event["step"] for event in events if event["event"] == "started"]


def test_a_branch_without_a_change_ends_with_the_bits_of_its_parent(parent):
    assert train_fresh(parent, BRANCH) == 0
    assert outcome(child_of(parent), STEPS) == outcome(parent, STEPS)


def test_a_branch_in_which_a_part_is_forgotten_does_not(parent):
    assert train_fresh(parent, BRANCH, left_out="optimizer") == 0
    assert outcome(child_of(parent), STEPS) != outcome(parent, STEPS)


def test_a_named_change_takes_effect_and_the_metrics_tell_the_whole_story(parent, lower):
    whole = outcome(parent, STEPS)
    assert lower["tensors"] != whole["tensors"]
    assert lower["metrics"][:LEAVES_AT] == whole["metrics"][:LEAVES_AT]
    assert [line["step"] for line in lower["metrics"]] == list(range(1, STEPS + 1))
    assert lower["metrics"][LEAVES_AT] != whole["metrics"][LEAVES_AT]


@pytest.mark.parametrize("step", [6, 8, 12])
def test_a_branch_killed_in_a_step_equals_one_that_was_not(parent, lower, step):
    assert train_fresh(parent, LOWER, in_step=step) == -signal.SIGKILL
    assert train_fresh(parent, LOWER) == 0
    assert outcome(child_of(parent), STEPS) == lower


@pytest.mark.parametrize("at", [1, 3, 8, 20, 25, 30, 32, 34, 36, 50, 60])
def test_a_branch_killed_while_it_is_made_equals_one_that_was_not(parent, lower, at):
    assert train_fresh(parent, LOWER, at_storage_step=at) == -signal.SIGKILL
    assert train_fresh(parent, LOWER) == 0
    assert outcome(child_of(parent), STEPS) == lower


def test_a_killed_branch_goes_on_from_its_newest_checkpoint_not_from_its_beginning(parent):
    assert train_fresh(parent, LOWER, in_step=13) == -signal.SIGKILL
    assert train_fresh(parent, LOWER) == 0
    assert starts_of(child_of(parent)) == [LEAVES_AT, 10]


def test_training_a_branch_leaves_the_parent_as_it_was(parent, finished):
    assert train_fresh(parent, {**LOWER, "save_total_limit": 1}) == 0
    for path in finished.rglob("*"):
        assert path.is_dir() or (parent / path.relative_to(finished)).read_bytes() == (
            path.read_bytes()
        )
    assert steps_in(child_of(parent)) == [STEPS]


def test_a_run_that_is_training_can_be_left(parent):
    with RunDirectory.open(parent):
        assert train_fresh(parent, LOWER) == 0
        assert train_fresh(parent, {}) == 1  # the parent itself is taken


# Where it begins, in this process


@pytest.fixture
def run(tmp_path):
    """A finished run with checkpoints 0, 2, 4 and 6, the best of which is 2."""
    folder = tmp_path / "run"
    judged(folder).train()
    return folder


def judged(folder, **settings):
    """A trainer whose evaluations get worse with each step."""
    trainer = small_trainer(folder, eval_steps=2, **settings)
    trainer.evaluate = lambda: {"eval_loss": float(trainer.progress.step)}
    return trainer


def branched(folder, which, name=NAME, **settings):
    settings = {"max_steps": 8, **settings}
    trainer = judged(folder, branch=name, resume_from_checkpoint=which, **settings)
    return trainer, trainer.train()


@pytest.mark.parametrize(
    ("which", "step"),
    [(4, 4), ("4", 4), ("best", 2), ("auto", 6), ("latest", 6), ("must", 6), (True, 6), (0, 0)],
)
def test_a_branch_begins_in_the_checkpoint_that_is_named(run, which, step):
    _, result = branched(run, which)
    assert result.resume_report.step == step
    assert RunDirectory.open_readonly(run / "branches" / NAME).parent.step == step
    assert result.progress.step == 8


def test_a_path_names_a_checkpoint_of_the_parent(run):
    assert branched(run, str(run / "checkpoint-4"))[1].resume_report.step == 4


def test_a_path_into_another_run_is_refused(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"begins in another run: expected a check.*/run"):
        branched(run, str(other / "checkpoint-4"))
    assert not (run / "branches").exists()


def test_never_and_a_branch_do_not_fit_together(run):
    with pytest.raises(ConfigError, match="branch: begins in a checkpoint") as error:
        branched(run, "never")
    assert "another output_dir" in error.value.hint


def test_a_branch_of_no_run_is_refused_and_makes_nothing(tmp_path):
    with pytest.raises(RunDirectoryError, match="is not a run's directory"):
        branched(tmp_path / "nowhere", 4)
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_newest_checkpoint_is_walked_past_and_told(run):
    damage(run / "checkpoint-6")
    _, result = branched(run, "auto")
    assert result.resume_report.step == 4
    assert any("not used: checkpoint-6" in line for line in result.resume_report.lines())


def test_a_damaged_checkpoint_asked_for_by_step_makes_no_branch(run):
    damage(run / "checkpoint-4")
    with pytest.raises(CorruptCheckpointError, match="checkpoint-4"):
        branched(run, 4)
    assert not (run / "branches" / NAME).exists()


def damage(checkpoint):
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("name", ["a/b", "..", "", ".x"])
def test_a_name_that_is_no_folder_name_is_refused_at_once(name):
    with pytest.raises(ConfigError, match="branch: is no name"):
        TrainerConfig(branch=name)


# The same command again


@pytest.mark.parametrize("again", [4, "auto", "latest", "best", "checkpoint-4"])
def test_the_same_branch_goes_on_from_its_newest_checkpoint(run, again):
    branched(run, 4)
    again = str(run / again) if again == "checkpoint-4" else again
    assert branched(run, again, max_steps=10)[1].resume_report.step == 8


@pytest.mark.parametrize("which", [2, "checkpoint-2"])
def test_the_same_name_at_another_step_is_refused_and_told_what_it_is(run, which):
    branched(run, 4)
    which = str(run / which) if which == "checkpoint-2" else which
    with pytest.raises(ConfigError, match="leaves at another step: expected 2, found 4") as error:
        branched(run, which)
    assert "ask for step 4" in error.value.hint


def test_a_second_start_in_the_same_process_goes_on_too(run):
    trainer, _ = branched(run, 4)
    assert trainer.load_checkpoint(4).step == 8
    with pytest.raises(ConfigError, match="leaves at another step"):
        trainer.load_checkpoint(2)
    trainer.checkpointer.close()


def test_a_branch_that_is_being_trained_is_locked(run):
    trainer, _ = branched(run, 4)
    trainer.load_checkpoint(4)
    with pytest.raises(LockHeldError):
        branched(run, 4)
    trainer.checkpointer.close()


def test_a_branch_without_a_checkpoint_never_begins_again_by_itself(run):
    branched(run, 4)
    for step in steps_in(run / "branches" / NAME):
        shutil.rmtree(run / "branches" / NAME / f"checkpoint-{step}")
    for folder, settings in [(run, {"branch": NAME}), (run / "branches" / NAME, {})]:
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint to resume"):
            small_trainer(folder, **settings).train()


def test_a_branch_never_falls_back_to_before_its_beginning(run):
    branched(run, 4, max_steps=4)
    assert steps_in(run / "branches" / NAME) == [2, 4]
    damage(run / "branches" / NAME / "checkpoint-4")
    with pytest.raises(CheckpointNotFoundError, match="the branch begins at step 4, after it"):
        branched(run, 4)


def test_the_directory_of_a_branch_is_a_run_like_any_other(run):
    branched(run, 4)
    result = small_trainer(run / "branches" / NAME, max_steps=10).train()
    assert (result.resume_report.step, result.progress.step) == (8, 10)


def test_a_branch_of_a_branch(run):
    branched(run, 4)
    _, result = branched(run / "branches" / NAME, 4, name="lower", learning_rate=0.1, allow=LR)
    assert result.resume_report.step == 4
    grandchild = run / "branches" / NAME / "branches" / "lower"
    assert [line["step"] for line in metrics(grandchild) if "loss" in line] == list(range(1, 9))


# Changed settings, the best model, other storages


LR = ("learning_rate",)


def test_a_changed_setting_has_to_be_named_on_a_branch_too(run):
    with pytest.raises(DifferenceError, match="learning_rate"):
        branched(run, 4, learning_rate=0.1)
    _, result = branched(run, 4, learning_rate=0.1, allow=LR)
    assert result.resume_report.step == 4


def test_what_a_branch_is_told_to_skip_is_skipped_once_although_its_parent_did_so_too(
    run, tmp_path
):
    skip, second = {"skip": ("optimizer",)}, tmp_path / "second"
    judged(second, resume_from_checkpoint=str(run / "checkpoint-2"), **skip).train()
    assert skipped(branched(second, 4, **skip)[1])
    assert not skipped(branched(second, 4, **skip)[1])


def skipped(result):
    return [d.path for d in result.resume_report.differences if "skip names it" in d.effect]


def test_the_best_weights_from_before_the_branch_are_there_at_its_end(run):
    best = load_file(run / "checkpoint-2" / "model.safetensors")
    branched(run, 4, max_steps=4)
    shutil.rmtree(run / "checkpoint-2")
    trainer, _ = branched(run, 4, load_best_model_at_end=True, save_total_limit=1)
    assert bits(trainer.model) == {name: value.numpy().tobytes() for name, value in best.items()}
    assert steps_in(run / "branches" / NAME) == [2, 8]


def test_the_report_says_which_branch_it_is(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    _, result = branched(run, 4)
    assert f"branch {NAME} of run at step 4" in result.resume_report.lines()
    assert branched(run, 4)[1].resume_report.notes[0] == f"branch {NAME} of run at step 4"


def test_a_branch_works_in_any_storage():
    storage = MemoryStorage()
    small_trainer("unused", trainer={"storage": storage}).train()
    settings = {"branch": NAME, "resume_from_checkpoint": 4, "max_steps": 8}
    result = small_trainer("unused", trainer={"storage": storage}, **settings).train()
    assert (result.resume_report.step, result.progress.step) == (4, 8)
    assert storage.stat(f"branches/{NAME}/checkpoint-8") is not None


def test_a_loop_of_ones_own_can_branch(tmp_path):
    model = nn.Linear(2, 1)
    with Checkpointer(tmp_path, model=model) as whole:
        whole.resume()
        whole.save(3)
        whole.save(4)
    before = bits(model)
    torch.nn.init.zeros_(model.weight)
    with Checkpointer(tmp_path, branch=NAME, model=model) as child:
        assert child.resume(3).step == 3
        child.save(5)
    assert bits(model) == before
    assert (steps_in(tmp_path), steps_in(tmp_path / "branches" / NAME)) == ([3, 4], [3, 5])


def test_a_loop_that_does_not_resume_makes_no_branch_by_accident(tmp_path):
    with Checkpointer(tmp_path, model=nn.Linear(2, 1)) as whole:
        whole.save(3)
    with (
        Checkpointer(tmp_path, branch=NAME, model=nn.Linear(2, 1)) as child,
        pytest.raises(ConfigError, match="has no branch lr-low yet"),
    ):
        child.save(4)
    assert not (tmp_path / "branches").exists()
