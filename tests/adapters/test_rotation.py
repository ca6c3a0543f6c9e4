"""What is removed to make room: the host's own takes what is not its own, ours never does."""

from __future__ import annotations

import os
import shutil

import pytest

LIMIT = {"save_total_limit": 2}


def steps_in(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-[0-9]*"))


def kept_by_hand(run):
    folder = run.folder / "run/checkpoint-final-keep"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("dear to me")
    os.utime(folder, (0, 0))
    return folder


@pytest.mark.stock
def test_the_hosts_own_removes_a_folder_of_the_user(run):
    folder = kept_by_hand(run)
    run(trainer="stock", args=LIMIT)
    assert not folder.exists()


def test_ours_leaves_a_folder_of_the_user(run):
    folder = kept_by_hand(run)
    assert run(args=LIMIT).status == 0
    assert (folder / "model.safetensors").read_text() == "dear to me"
    assert steps_in(run.folder / "run") == [35, 36]


@pytest.mark.stock
def test_the_hosts_own_resumes_a_stale_checkpoint_of_another_run(run):
    run("old", trainer="stock")
    run(trainer="stock", kill_at=8)
    shutil.copytree(run.folder / "old/checkpoint-36", run.folder / "run/checkpoint-36")
    assert run(trainer="stock", resume=True).first_step is None  # it takes the run for finished


def test_ours_knows_a_checkpoint_of_another_run(run, uninterrupted):
    run("old", model_seed=7)
    run(kill_at=8)
    shutil.copytree(run.folder / "old/checkpoint-36", run.folder / "run/checkpoint-36")
    resumed = run()
    assert (resumed.first_step, resumed.bits) == (6, uninterrupted().bits)
    assert any("belongs to another run" in line for line in resumed.report)


def test_the_best_stays_and_is_loaded_in_the_end(run):
    best = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    done = run(args={**best, "save_total_limit": 1, "learning_rate": 0.05})
    assert done.best in {path.name for path in (run.folder / "run").glob("checkpoint-*")}
    assert len(steps_in(run.folder / "run")) <= 2
