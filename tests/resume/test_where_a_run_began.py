"""Runs that begin in a checkpoint of another one, and run directories that lost one of their files.

The same command, given again, goes on; and what somebody lost beside the checkpoints stops nobody.
"""

from __future__ import annotations

import json
import shutil

import pytest
from torch import nn

from scenarios import metrics
from small_trainers import bits, small_trainer, steps_in
from unbroken import Checkpointer
from unbroken.errors import CheckpointNotFoundError, CorruptCheckpointError, RunDirectoryError
from unbroken.store import RunDirectory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of six steps with checkpoints 0, 2, 4 and 6, and its weights; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer = small_trainer(folder)
    trainer.train()
    return folder, bits(trainer.model)


@pytest.fixture
def other(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished[0], tmp_path / "other")


def train(folder, which, **settings):
    trainer = small_trainer(folder, **settings)
    trainer.train(which)
    return trainer


def report_of(folder, which, **settings):
    return train(folder, which, **settings).resume_report


def train_and_lose_the_end(folder, which):
    """Leave what a run leaves that is killed before it saves step 6."""
    trainer = train(folder, which)
    shutil.rmtree(folder / "checkpoint-6")
    return trainer


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# The path of a checkpoint of another run, given again


def spelled_otherwise(path, how, monkeypatch):
    """Return a path as a user may write it the second time."""
    if how == "relative":
        monkeypatch.chdir(path.parent)
        return path.name
    if how == "linked":
        (path.parent.parent / "link").symlink_to(path)
        return path.parent.parent / "link"
    if how == "moved":
        path.parent.rename(path.parent.parent / "elsewhere")
        return path.parent.parent / "elsewhere" / path.name
    if how == "gone":
        shutil.rmtree(path.parent)
    return f"{path}/" if how == "with a slash" else path


@pytest.mark.parametrize("how", ["same", "relative", "linked", "with a slash", "moved", "gone"])
def test_the_same_command_again_goes_on_from_the_runs_own_newest(how, other, tmp_path, monkeypatch):
    path = other / "checkpoint-2"
    train(tmp_path / "new", path, max_steps=4)
    report = report_of(tmp_path / "new", spelled_otherwise(path, how, monkeypatch))
    assert (report.step, report.set_aside) == (4, ())
    assert "it goes on from its own newest checkpoint" in report.notes[0]
    assert [line["step"] for line in metrics(tmp_path / "new")] == [3, 4, 5, 6]


def test_it_ends_with_the_bits_of_the_run_that_was_left(finished, other, tmp_path):
    for _ in range(2):
        train_and_lose_the_end(tmp_path / "new", other / "checkpoint-2")
    last = train(tmp_path / "new", other / "checkpoint-2")
    assert (last.resume_report.step, bits(last.model)) == (4, finished[1])


def test_a_link_that_names_another_checkpoint_by_now_is_still_where_the_run_began(other, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(other / "checkpoint-2")
    train(tmp_path / "new", link, max_steps=4)
    link.unlink()
    link.symlink_to(other / "checkpoint-6")
    assert report_of(tmp_path / "new", link).step == 4


def test_killed_before_its_first_save_a_run_begins_there_again(other, tmp_path):
    began = small_trainer(tmp_path / "new")
    began.load_checkpoint(other / "checkpoint-2")
    began.checkpointer.close()  # killed: nothing was saved
    report = report_of(tmp_path / "new", other / "checkpoint-2")
    assert (report.step, steps_in(tmp_path / "new")) == (2, [4, 6])


def test_another_checkpoint_than_where_it_began_is_a_new_beginning(other, tmp_path):
    train(tmp_path / "new", other / "checkpoint-2")
    report = report_of(tmp_path / "new", other / "checkpoint-4")
    assert (report.step, len(report.set_aside)) == (4, 2)
    assert report_of(tmp_path / "new", other / "checkpoint-4").step == 6


def test_a_damaged_newest_is_walked_past_as_ever(other, tmp_path):
    train(tmp_path / "new", other / "checkpoint-2")
    damage(tmp_path / "new" / "checkpoint-6" / "model.safetensors")
    report = report_of(tmp_path / "new", other / "checkpoint-2")
    assert (report.step, [one.folder for one in report.rejected]) == (4, ["checkpoint-6"])


def test_where_all_its_own_are_damaged_it_never_begins_again_by_itself(other, tmp_path):
    train(tmp_path / "new", other / "checkpoint-2")
    for step in (4, 6):
        damage(tmp_path / "new" / f"checkpoint-{step}" / "manifest.json")
    with pytest.raises(CheckpointNotFoundError, match="not one checkpoint is intact"):
        train(tmp_path / "new", other / "checkpoint-2")
    assert steps_in(tmp_path / "new") == [4, 6]


def test_a_checkpoint_of_the_run_itself_rewinds_it_each_time(other):
    for _ in range(2):
        assert report_of(other, other / "checkpoint-2").step == 2
        assert steps_in(other) == [0, 2, 4, 6]


def test_a_checkpointer_goes_on_too(tmp_path):
    with Checkpointer(tmp_path / "old", model=nn.Linear(2, 1)) as old:
        path = old.save(8)
    for begins, ends in ((8, 10), (10, 12), (12, 14)):
        with Checkpointer(tmp_path / "new", model=nn.Linear(2, 1)) as new:
            assert new.resume(path).step == begins
            new.save(ends)


# A checkpoint folder that was copied into a new directory


def copy_of(other, step, folder, name=None):
    return shutil.copytree(other / f"checkpoint-{step}", folder / (name or f"checkpoint-{step}"))


@pytest.mark.parametrize("which", ["auto", "latest", 2, "path"])
def test_a_run_begins_in_a_checkpoint_that_was_copied_there(which, finished, other, tmp_path):
    copied = copy_of(other, 2, tmp_path / "new")
    first = train_and_lose_the_end(tmp_path / "new", copied if which == "path" else which)
    run_id = json.loads((tmp_path / "new" / "run.json").read_text())["id"]
    assert first.resume_report.step == 2
    assert "checkpoint-2 is of run" in first.resume_report.notes[0]
    assert json.loads((other / "run.json").read_text())["id"] != run_id
    again = train(tmp_path / "new", "auto" if which == 2 else copied if which == "path" else which)
    assert (again.resume_report.step, bits(again.model)) == (4, finished[1])


def test_killed_before_its_first_save_it_begins_in_the_copy_again(other, tmp_path):
    copy_of(other, 2, tmp_path / "new")
    for _ in range(2):
        began = small_trainer(tmp_path / "new")
        assert began.load_checkpoint("auto").step == 2
        began.checkpointer.close()
    assert steps_in(tmp_path / "new") == [2]


def test_of_several_copies_the_newest_intact_one_is_taken(other, tmp_path):
    for step in (2, 4, 6):
        copy_of(other, step, tmp_path / "new")
    damage(tmp_path / "new" / "checkpoint-6" / "manifest.json")
    damage(tmp_path / "new" / "checkpoint-4" / "model.safetensors")
    report = report_of(tmp_path / "new", "auto")
    assert (report.step, len(report.rejected)) == (2, 2)


def test_a_copy_under_the_name_of_another_step_is_gone_on_from_by_its_own(other, tmp_path):
    copy_of(other, 2, tmp_path / "new", "checkpoint-100")
    assert report_of(tmp_path / "new", "auto", max_steps=4).step == 2
    assert report_of(tmp_path / "new", "auto").step == 4


def test_a_copy_under_another_name_is_named_and_taken_by_its_path(other, tmp_path):
    copied = copy_of(other, 2, tmp_path / "new", "base")
    with pytest.raises(RunDirectoryError, match="base") as caught:
        train(tmp_path / "new", "auto")
    assert "give its path as resume_from_checkpoint" in caught.value.hint
    assert report_of(tmp_path / "new", copied, max_steps=4).step == 2
    assert report_of(tmp_path / "new", copied).step == 4


@pytest.mark.parametrize("lost", [["metrics.jsonl"], ["metrics.jsonl", "history.jsonl"]])
def test_a_copy_with_its_run_json_is_the_same_run(lost, other, tmp_path):
    copy_of(other, 4, tmp_path / "new")
    shutil.copy(other / "run.json", tmp_path / "new" / "run.json")
    report = report_of(tmp_path / "new", "auto")
    assert report.step == 4
    assert "metrics.jsonl is not what it was" in report.notes[0]


def test_a_run_with_checkpoints_of_its_own_takes_no_copy_by_itself(other, tmp_path):
    train(tmp_path / "new", "auto", max_steps=4)
    copy_of(other, 6, tmp_path / "new")
    report = report_of(tmp_path / "new", "auto", max_steps=5)
    assert (report.step, report.rejected[0].folder) == (4, "checkpoint-6")
    copy_of(other, 6, tmp_path / "new")
    with pytest.raises(CorruptCheckpointError, match="belongs to another run"):
        train(tmp_path / "new", 6)


# Files of the run directory that were damaged, shortened or lost


def spoil(folder, how):
    path = folder / "run.json"
    if how == "gone":
        path.unlink()
    elif how == "another text":
        path.write_text('{"format": "unbroken rum", "version": 1}')
    else:
        path.write_bytes(b"" if how == "empty" else path.read_bytes()[:-9])


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "another text"])
def test_a_run_json_that_is_damaged_is_made_anew_from_the_checkpoints(how, finished, other):
    run_id = json.loads((other / "run.json").read_text())["id"]
    shutil.rmtree(other / "checkpoint-6")
    spoil(other, how)
    assert RunDirectory.open_readonly(other).run_id == run_id
    trainer = train(other, "auto")
    assert (trainer.resume_report.step, bits(trainer.model)) == (4, finished[1])
    assert "made anew from what the checkpoints say" in trainer.resume_report.notes[0]
    assert json.loads((other / "run.json").read_text())["id"] == run_id
    assert report_of(other, "auto").notes == ()


def test_a_branch_that_lost_its_run_json_is_still_one(other):
    branch = {"branch": "longer"}
    train(other, 2, max_steps=4, **branch)
    before = json.loads((other / "branches/longer/run.json").read_text())
    spoil(other / "branches/longer", "cut")
    assert report_of(other, "auto", **branch).step == 4
    assert (
        json.loads((other / "branches/longer/run.json").read_text())["parent"] == before["parent"]
    )


def test_the_run_json_of_another_program_is_left_alone(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "theirs"}')
    with pytest.raises(RunDirectoryError, match=r"run\.json"):
        train(tmp_path, "auto")
    assert (tmp_path / "run.json").read_text() == '{"name": "theirs"}'


LINES = {"gone": None, "empty": [], "shortened": [1, 2, 3], "first lost": [2, 3, 4, 5, 6]}


@pytest.mark.parametrize("how", LINES)
def test_a_run_goes_on_with_what_is_left_of_its_metrics(how, finished, other):
    shutil.rmtree(other / "checkpoint-6")
    path = other / "metrics.jsonl"
    kept = [
        line
        for line in path.read_text().splitlines()
        if json.loads(line)["step"] in (LINES[how] or ())
    ]
    path.write_text("".join(f"{line}\n" for line in kept))
    if how == "gone":
        path.unlink()
    trainer = train(other, "auto")
    assert (trainer.resume_report.step, bits(trainer.model)) == (4, finished[1])
    assert "goes on with the lines that are left" in trainer.resume_report.notes[0]
    assert [line["step"] for line in metrics(other)] == [
        *[n for n in LINES[how] or () if n <= 4],
        5,
        6,
    ]
    assert report_of(other, "auto").notes == ()


def test_of_older_and_later_copies_only_those_of_another_future_go(other, tmp_path):
    folder = tmp_path / "new"
    train(folder, "auto", max_steps=3, save_steps=3, save_at_start=False)
    for step in (0, 2, 4, 6):
        shutil.copytree(other / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    report = report_of(folder, folder / "checkpoint-4", max_steps=5, save_steps=9)
    assert report.step == 4
    gone = sorted(was for was, _ in report.set_aside)
    assert gone == ["checkpoint-3", "checkpoint-6"]  # its own, and a later one
    assert {0, 2, 4} <= set(steps_in(folder))
