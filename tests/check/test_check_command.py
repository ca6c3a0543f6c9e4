"""`unbroken check` as a user gives it: real processes, several kills, exit status, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from check.trials import SCRIPTS

PLAIN = [sys.executable, str(SCRIPTS / "plain.py"), "--out"]


@pytest.fixture
def check(tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "unbroken", "check", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run


@pytest.mark.slow
def test_a_run_killed_twice_and_resumed_is_exact(check):
    done = check("--at", "6,13", "--json", "--", *PLAIN, "{out}")
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"]["status"]) == (0, "exact"), done.stdout
    assert [kill["after"] for kill in found["kills"]] == [6, 13]
    assert "resumed after step 12; 6 steps" in found["kills"][1]["words"]


@pytest.mark.slow
def test_what_is_broken_is_told_in_plain_words(check):
    words = ("--at", "10", "--steps", "12", "--", *PLAIN, "{out}", "--bug", "forgets the optimizer")
    done = check(*words)
    assert done.returncode == 1
    assert "NOT EXACT  optimizer  at step 9" in done.stdout
    assert "the optimizer's state was not loaded" in done.stdout
    assert "The recorder took" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_no_reference_leaves_the_question_open(check):
    done = check("--", *PLAIN, "{out}", "--bug", "nondeterministic")
    assert done.returncode == 2
    assert "not deterministic at all: two uninterrupted runs differ from step 1 on" in done.stdout


LOCAL = """
import os, pathlib, torch
out = pathlib.Path(FOLDER)
out.mkdir(exist_ok=True)
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
data = torch.randn(8, 4)
saved = out / "checkpoint.pt"
first = 0
if saved.exists():
    first, weights, state = torch.load(saved)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
for step in range(first, 8):
    model(data[step]).square().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 3:
        torch.save([4, model.state_dict(), optimizer.state_dict()], saved)
"""
HERE = LOCAL.replace("FOLDER", "'run'")
BY_VARIABLE = LOCAL.replace("FOLDER", "os.environ['UNBROKEN_CHECK_OUT']")
KEPT_APART = {
    "a copy of the current folder": (HERE, ()),
    "what --clean names": (HERE, ("--clean", "run")),
    "which the script takes from UNBROKEN_CHECK_OUT": (BY_VARIABLE, ()),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", KEPT_APART)
def test_the_runs_are_kept_apart_and_nothing_is_left(check, tmp_path, how):
    script, options = KEPT_APART[how]
    (tmp_path / "train.py").write_text(script)
    done = check(*options, "--at", "6", "--", sys.executable, "train.py")
    assert done.returncode == 0, done.stdout
    assert how in done.stdout
    assert os.listdir(tmp_path) == ["train.py"]


@pytest.mark.slow
def test_another_command_can_resume(check):
    again = " ".join([*PLAIN, "{out}", "--bug 'forgets the scheduler'"])
    done = check("--at", "10", "--resume-command", again, "--", *PLAIN, "{out}")
    assert "NOT EXACT  scheduler" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the command is missing"),
        ("--at 3,2 -- true", "--at: expected steps in rising order"),
        ("--at x -- true", "--at: expected steps such as 7 or 7,12"),
        ("--kills 0 -- true", "--kills: expected at least 1"),
        ("--clean ../x -- true", "--clean: must lie below the current folder"),
        ("--clean there -- true", "--clean: is there already"),
        ("-- no-such-program", "no-such-program: cannot be started"),
    ],
)
def test_a_question_that_cannot_be_asked_is_an_error(check, tmp_path, words, message):
    (tmp_path / "there").touch()
    done = check(*words.split())
    assert done.returncode == 2
    assert message in done.stderr


def test_a_script_that_fails_is_shown_with_its_last_words(check):
    done = check("--", sys.executable, "-c", "raise SystemExit('no data')")
    assert done.returncode == 2
    assert "the script ended with status 1" in done.stdout
    assert "no data" in done.stdout


def test_a_script_without_an_optimizer_is_not_judged(check):
    done = check("--", sys.executable, "-c", "print(1)")
    assert done.returncode == 2
    assert "no optimizer step was seen" in done.stdout
