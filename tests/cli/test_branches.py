"""Branches on the command line: made by train, shown as a tree by ls, told by show."""

from __future__ import annotations

import json
import shutil

import pytest

from cli.sample_run import BEGUN, make_run, save
from cli.test_file_commands import check_golden
from unbroken.cli.demo import compare_runs
from unbroken.language_model.train import parse_settings
from unbroken.store import RunDirectory, branch

CHILD_ID, GRANDCHILD_ID = "c" * 32, "d" * 32


def make_branch(parent, name, step, run_id, *more):
    """Make a branch of a run, with more checkpoints at these steps."""
    run = RunDirectory.open_readonly(parent)
    with branch(run, name, step=step, clock=lambda: BEGUN, new_id=lambda: run_id) as child:
        for later in more:
            save(child, later, fill=8, seconds=3, clock=lambda: BEGUN)
    return parent / "branches" / name


@pytest.fixture
def child(run):
    """The branch "lr-low" of the run "gpt2", left at step 20."""
    return make_branch(run, "lr-low", 20, CHILD_ID, 30)


@pytest.fixture
def family(child, here):
    """That branch, a branch of it, another branch that was moved, and a run of its own."""
    make_branch(child, "lower", 30, GRANDCHILD_ID)
    make_branch(here / "gpt2", "lr-high", 10, "e" * 32).rename(here / "moved")
    identity = json.loads((make_run(here / "zeta") / "run.json").read_text())
    text = json.dumps({**identity, "id": "f" * 32}, sort_keys=True, separators=(",", ":"))
    (here / "zeta" / "run.json").write_text(text + "\n")
    return here


@pytest.mark.parametrize(
    ("golden", "command"),
    [
        ("branches-ls-overview.txt", "ls"),
        ("branches-ls.txt", "ls gpt2"),
        ("branches-ls.json", "ls gpt2 --json"),
        ("branches-ls-child.txt", "ls gpt2/branches/lr-low"),
        ("branches-show.txt", "show gpt2/branches/lr-low --history"),
        ("branches-show.json", "show gpt2/branches/lr-low --json"),
    ],
)
def test_a_family_of_runs_reads_as_in_the_golden_file(unbroken, family, golden, command):
    status, output, errors = unbroken(*command.split())
    assert (status, errors) == (0, "")
    check_golden(golden, output, family)


def test_a_branch_is_found_however_deep_it_lies(unbroken, family):
    (family / "deep" / "down").mkdir(parents=True)
    (family / "moved").rename(family / "deep" / "down" / "high")
    output = unbroken("ls", ".")[1]
    assert "\n  deep/down/high at step 10  " in output


def test_without_its_parent_a_branch_names_the_run_by_its_id(unbroken, child, here):
    child.rename(here / "alone")
    shutil.rmtree(here / "gpt2")
    assert "alone at step 20 of run 01234567" in unbroken("ls")[1]
    assert f"run {'0123456789abcdef' * 2} at step 20" in unbroken("show", "alone")[1]


def test_of_two_copies_of_a_parent_the_one_that_holds_the_branch_is_its_parent(
    unbroken, child, here
):
    shutil.copytree(here / "gpt2", here / "a-copy")
    listed = [run["path"] for run in json.loads(unbroken("ls", ".", "--json")[1])["runs"]]
    inside = "branches/lr-low"
    assert [path.removeprefix(f"{here}/") for path in listed] == [
        "a-copy",
        f"a-copy/{inside}",
        "gpt2",
        f"gpt2/{inside}",
    ]


def test_a_run_behind_a_link_is_listed(unbroken, run, here):
    (here / "runs").mkdir()
    (here / "runs" / "linked").symlink_to(run)
    assert "runs/linked" in unbroken("ls")[1]


def test_checkpoints_of_a_branch_verify_although_another_run_wrote_them(unbroken, child):
    status, output, _ = unbroken("verify", child)
    assert (status, output.count(": intact:")) == (0, 3)


# train


@pytest.mark.parametrize("option", ["--resume 4", "--resume=4", "--resume-from-checkpoint 4"])
def test_resume_is_short_for_resume_from_checkpoint(here, option):
    (here / "config.yaml").write_text("output_dir: run\n")
    trainer = parse_settings(["config.yaml", *option.split(), "--branch", "lr-low"]).trainer
    assert (trainer.resume_from_checkpoint, trainer.branch) == (4, "lr-low")


LOWER = ("--learning_rate", "1e-6")
CONFIG = """\
output_dir: run
max_steps: 6
batch_size: 4
save_steps: 2
logging_steps: 1
log_data_digest: true
model: {n_layer: 1, n_head: 2, n_embd: 16, n_positions: 32}
data: {train: "*.txt", block_size: 16}
"""


@pytest.fixture
def trained(here, unbroken):
    """A run of 6 steps with a checkpoint at each second one."""
    (here / "a.txt").write_text("To be, or not to be, that is the question.\n" * 20)
    (here / "config.yaml").write_text(CONFIG)
    assert unbroken("train", "config.yaml")[0] == 0
    return here


def is_same(one, other):
    return all(part.is_same for part in compare_runs(one, other, step=6))


def test_train_branches_and_the_same_command_goes_on(unbroken, trained):
    command = ("train", "config.yaml", "--resume", "2", "--branch", "same")
    status, output, _ = unbroken(*command)
    assert status == 0
    assert "branch same of run at step 2" in output
    assert is_same(trained / "run", trained / "run/branches/same")
    assert "run/branches/same/checkpoint-6 (step 6)" in unbroken(*command)[1]


def test_a_changed_setting_has_to_be_named(unbroken, trained):
    command = ("train", "config.yaml", "--resume", "2", "--branch", "low", *LOWER)
    assert unbroken(*command)[0] == 13
    assert unbroken(*command, "--allow", "learning_rate")[0] == 0
    assert not is_same(trained / "run", trained / "run/branches/low")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--resume", "2", "--branch", "a/b"), 2, "branch: is no name"),
        (("--resume", "never", "--branch", "x"), 2, "branch: begins in a checkpoint"),
        (("--resume", "3", "--branch", "x"), 9, "one of the steps [0, 2, 4, 6], found 3"),
        (("--branch", "x", "--output-dir", "nowhere"), 5, "is not a run's directory"),
    ],
)
def test_what_cannot_be_branched_is_one_sentence_and_a_status(
    unbroken, trained, words, status, message
):
    found, _, errors = unbroken("train", "config.yaml", *words)
    assert found == status
    assert message in errors
    assert not (trained / "run" / "branches").exists()
