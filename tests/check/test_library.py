"""The check as a library, for the tests of other projects."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from check.test_check_command import HERE
from unbroken.testing import assert_loader_resumes_at_every_step, assert_resumes_exactly

FORGETFUL = HERE.replace("    optimizer.load_state_dict(state)\n", "")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_a_script_that_forgets_its_optimizer_fails_the_assertion(tmp_path):
    (tmp_path / "train.py").write_text(FORGETFUL)
    with pytest.raises(AssertionError, match="optimizer: weights of step 4, but all moments"):
        assert_resumes_exactly("train.py", at=[6], folder=tmp_path)


@pytest.mark.slow
def test_the_fixture_finds_the_script_beside_the_test(tmp_path):
    (tmp_path / "train.py").write_text(HERE)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["unbroken.testing.pytest_plugin"]\n')
    (tmp_path / "test_it.py").write_text(
        "def test_it(resumes_exactly):\n    assert resumes_exactly('train.py', at=[6]).steps == 8\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", str(tmp_path), "--rootdir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


class Loader:
    """Batches of a shuffled order, with workers' look-ahead left to the fault."""

    def __init__(self, fault=""):
        self.fault = fault
        self.state = {"position": 0}

    def __iter__(self):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        while self.state["position"] < 12:
            position = self.state["position"]
            self.state["position"] += 3
            yield order[position : position + 3]

    def state_dict(self):
        return self.state if self.fault == "hands out its own state" else dict(self.state)

    def load_state_dict(self, state):
        position = state["position"] + (3 if self.fault == "skips a batch" else 0)
        self.state = {"position": 0 if self.fault == "forgets" else position}


def test_a_loader_that_continues_from_every_batch_passes():
    assert_loader_resumes_at_every_step(Loader)
    assert_loader_resumes_at_every_step(Loader, steps=2)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("forgets", "restored after batch 1: batch 2 is batch 1"),
        ("skips a batch", "restored after batch 1: batch 2 is batch 3"),
        ("hands out its own state", "the state after batch 1 was changed by going on"),
    ],
)
def test_a_loader_that_does_not_is_told_where(fault, message):
    with pytest.raises(AssertionError, match=message):
        assert_loader_resumes_at_every_step(lambda: Loader(fault))


def test_a_loader_whose_iterator_has_the_state_is_understood():
    class Iterator(Loader):
        def __iter__(self):
            return self

        def __next__(self):
            return next(Loader.__iter__(self))

    class Outer:
        def __iter__(self):
            return Iterator()

    assert_loader_resumes_at_every_step(Outer)


def test_a_loader_with_nothing_to_resume_is_no_proof():
    with pytest.raises(AssertionError, match="nothing to resume: the loader gave 1 batches"):
        assert_loader_resumes_at_every_step(Loader, steps=1)
