"""Whatever gives a loop its data, it goes on after any step, or is refused before the first."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader

from fresh import run_fresh
from loops.data_of_loops import KINDS, LOOPS, STEPS, ended, few, killed, train_here
from loops.scripts_of_loops import Run
from small_trainers import steps_in
from unbroken.errors import DataError

EXACT = [kind for kind in KINDS if kind != "forgetful"]
SLOW = {(kind, "epochs") for kind in EXACT if "workers" in kind}  # as quick ones, with processes
PAIRS = [
    pytest.param(kind, loop, marks=[pytest.mark.sweep] if (kind, loop) in SLOW else [])
    for kind in EXACT
    for loop in LOOPS
]


@pytest.mark.parametrize(("kind", "loop"), PAIRS)
def test_killed_after_each_step_it_ends_with_the_same_bits(kind, loop, tmp_path):
    whole, _ = ended(tmp_path / "whole", kind, loop)
    kills = STEPS - 1 if loop == "steps" else 3
    bits, told = ended(tmp_path / "cut", kind, loop, kills)
    assert bits == whole
    assert "exact" in told
    assert "repeated with the same bits" in told


def test_data_that_read_what_nothing_saves_are_refused_before_the_next_step(tmp_path):
    killed(tmp_path, "forgetful", "epochs", 4)  # to within the second epoch
    assert run_fresh(train_here, str(tmp_path), "forgetful", "epochs", 0) == 1
    told = (tmp_path / "told").read_text()
    assert "item 0 of epoch 1: what is read again is not what the run was trained on" in told
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4]


def test_a_loader_whose_workers_persist_is_refused_before_the_first_step(tmp_path):
    loader = DataLoader(few(), 4, num_workers=2, persistent_workers=True)
    with pytest.raises(DataError, match="persistent_workers=True keeps the workers' random state"):
        Run(tmp_path, data=loader, save_steps=1).run.steps(3)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("loop", ["steps", "epochs"])
def test_an_iterator_that_can_be_read_once_is_refused_before_the_first_step(loop, tmp_path):
    with pytest.raises(DataError):
        getattr(Run(tmp_path, data=iter(few()), save_steps=1).run, loop)(2)
