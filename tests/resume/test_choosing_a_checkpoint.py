"""Which checkpoint a start goes on from, what becomes of the others, and what it says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from scenarios import metrics
from small_trainers import bits, small_model, small_trainer, steps_in
from unbroken.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DifferenceError,
    LockHeldError,
    RunDirectoryError,
    StateMismatchError,
)


@pytest.fixture
def run(tmp_path):
    """A finished run with checkpoints 0, 2, 4 and 6."""
    folder = tmp_path / "run"
    small_trainer(folder).train()
    return folder


def damage(checkpoint, name="model.safetensors"):
    data = bytearray((checkpoint / name).read_bytes())
    data[-1] ^= 1
    (checkpoint / name).write_bytes(data)


def resumed_at(folder, which, **settings):
    return small_trainer(folder, **settings).train(which).resume_report.step


@pytest.mark.parametrize("which", ["auto", "must", "latest", "last", True, 6, "6", None])
def test_the_newest_intact_checkpoint_is_resumed(run, which):
    assert resumed_at(run, which) == 6


def test_a_damaged_newest_checkpoint_is_walked_past_and_named(run):
    damage(run / "checkpoint-6")
    report = small_trainer(run).train().resume_report
    assert report.step == 4
    assert [item.folder for item in report.rejected] == ["checkpoint-6"]
    assert "is damaged" in report.rejected[0].reason


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "manifest.json"])
def test_damage_in_any_file_is_found_before_the_first_step(run, name):
    damage(run / "checkpoint-6", name)
    assert resumed_at(run, "auto") == 4


def test_a_run_that_walked_back_ends_with_the_same_bits(run):
    first = small_trainer(run)
    first.train()
    damage(run / "checkpoint-6")
    second = small_trainer(run)
    second.train()
    assert bits(second.model) == bits(first.model)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over_by_itself(run):
    for step in steps_in(run):
        damage(run / f"checkpoint-{step}")
    with pytest.raises(CheckpointNotFoundError, match="not one checkpoint is intact") as caught:
        small_trainer(run).train()
    assert steps_in(run) == [0, 2, 4, 6]
    *lines, last = caught.value.hint.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"checkpoint-{n}" for n in (6, 4, 2, 0)]
    assert max(map(len, lines)) < 120
    assert "unbroken verify" in last


def test_a_damaged_checkpoint_asked_for_by_step_is_an_error(run):
    damage(run / "checkpoint-4")
    with pytest.raises(CorruptCheckpointError, match="checkpoint-4"):
        small_trainer(run).train(4)


def test_a_step_that_was_never_saved_is_answered_with_those_that_were(run):
    with pytest.raises(CheckpointNotFoundError, match=r"\[0, 2, 4, 6\], found 5"):
        small_trainer(run).train(5)


def test_must_without_any_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint to resume"):
        small_trainer(tmp_path / "new").train("must")


def test_resuming_an_earlier_step_sets_the_later_ones_aside(run):
    report = small_trainer(run, max_steps=3).train(2).resume_report
    assert [old for old, _ in report.set_aside] == ["checkpoint-4", "checkpoint-6"]
    assert all((run / new / "manifest.json").exists() for _, new in report.set_aside)
    assert resumed_at(run, "auto", max_steps=3) == 3


def test_never_starts_anew_and_keeps_the_old_run_aside(run):
    report = small_trainer(run, max_steps=1).train("never").resume_report
    assert report.step == 0
    assert len(report.set_aside) == 4
    assert [line["step"] for line in metrics(run)] == [1]
    kept = (run / "set-aside" / "metrics.jsonl.1").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_run_is_where_a_run_may_begin(run, tmp_path):
    branch = tmp_path / "branch"
    assert resumed_at(branch, run / "checkpoint-4") == 4
    assert steps_in(branch) == [6]
    assert steps_in(run) == [0, 2, 4, 6]


def test_the_same_command_again_goes_on_in_a_run_that_began_elsewhere(run, tmp_path):
    branch = tmp_path / "branch"
    small_trainer(branch, max_steps=5).train(str(run / "checkpoint-4"))
    assert resumed_at(branch, str(run / "checkpoint-4"), max_steps=7) == 5


def test_a_copy_of_one_checkpoint_is_a_whole_checkpoint(run, tmp_path):
    shutil.copytree(run / "checkpoint-4", tmp_path / "copy")
    shutil.rmtree(run)
    assert resumed_at(tmp_path / "other", tmp_path / "copy") == 4


def test_a_path_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"nowhere: is no checkpoint"):
        small_trainer(tmp_path / "run").train(tmp_path / "nowhere")


@pytest.mark.parametrize("which", ["", -1, 1.5, []])
def test_nonsense_is_answered_with_what_may_be_said(tmp_path, which):
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        small_trainer(tmp_path).train(which)


def test_a_model_of_another_shape_is_refused_with_both_shapes_and_left_alone(run):
    other = small_model(width=9)
    before = bits(other)
    with pytest.raises(StateMismatchError, match=r"0\.weight.*\[8, 6\].*\[9, 6\]"):
        small_trainer(run, model=other).train()
    assert bits(other) == before


def test_another_optimizer_is_refused_by_its_class(run):
    model = small_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(DifferenceError, match=r"optimizer\.class.*AdamW.*SGD"):
        small_trainer(run, model=model, trainer={"optimizer": sgd}).train()


def test_a_second_process_is_kept_out_while_the_first_works(run):
    first = small_trainer(run)
    first.load_checkpoint()
    with pytest.raises(LockHeldError, match="process"):
        small_trainer(run).train()
    first.checkpointer.close()


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(RunDirectoryError, match="expected"):
        small_trainer(tmp_path).train()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_history_tells_every_start_and_every_save(run):
    small_trainer(run).train(4)
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("started") == 2
    assert [event["step"] for event in events if event["event"] == "saved"] == [0, 2, 4, 6, 6]
