"""Runs of the Hugging Face Trainer that begin in a checkpoint of another run, and what follows."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture(params=["stock", "ours"])
def other(request, run):
    """The path of checkpoint 10 of another run, which was killed at step 13."""
    assert run("other", trainer=request.param, kill_at=13).status != 0
    return run.folder / "other" / "checkpoint-10"


def test_the_same_command_ends_although_it_is_killed_again_and_again(other, run, uninterrupted):
    for kill_at in (18, 28):  # each time after two saves
        assert run(resume=str(other), kill_at=kill_at).status == -9
    resumed = run(resume=str(other))
    assert resumed.first_step == 26
    assert resumed.digest == uninterrupted().digest
    assert any("it goes on from its own newest checkpoint" in line for line in resumed.report)


def test_killed_before_its_first_save_a_run_begins_there_again(other, run):
    assert run(resume=str(other), kill_at=12).status == -9
    assert run(resume=str(other)).first_step == 11


@pytest.mark.parametrize("how", ["moved", "linked"])
def test_a_path_that_is_spelled_otherwise_is_the_same_checkpoint(how, other, run):
    run(resume=str(other), kill_at=18)
    elsewhere = run.folder / "elsewhere"
    if how == "moved":
        other.rename(elsewhere)
    else:
        elsewhere.symlink_to(other)
    assert run(resume=str(elsewhere)).first_step == 16


@pytest.mark.parametrize("by_path", [False, True])
def test_a_run_begins_in_a_folder_that_was_copied_into_its_directory(
    by_path, other, run, uninterrupted
):
    copied = shutil.copytree(other, run.folder / "run" / "checkpoint-10")
    wanted = {"resume": str(copied)} if by_path else {}
    assert run(kill_at=18, **wanted).status == -9
    resumed = run()
    assert resumed.first_step == 16
    assert resumed.digest == uninterrupted().digest


def test_of_several_copied_folders_the_newest_intact_one_is_taken(run):
    run("other", trainer="ours", kill_at=13)
    for step in (5, 10):
        name = f"checkpoint-{step}"
        shutil.copytree(run.folder / "other" / name, run.folder / "run" / name)
    weights = run.folder / "run" / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    resumed = run()
    assert resumed.first_step == 6
    assert any("checkpoint-5 is of run" in line for line in resumed.report)
