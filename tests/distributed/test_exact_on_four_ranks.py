"""On four ranks the order of a sum matters; two numbers have only one sum.

`DistributedDataParallel` lays its buckets out anew after the first backward pass of a process, in
the order in which gradients came. A ring adds each part of a bucket in an order of its own; so a
resumed process, whose buckets have the first layout again, adds in another order than the run that
was not interrupted.
"""

from __future__ import annotations

import signal

import pytest
import torch

from distributed.bare_ddp import CUT, ends_with
from distributed.models import STEPS, Shuffled
from distributed.ranks import run_ranks
from distributed.training import make_trainer
from scenarios import outcome

SETTINGS = {"batch_size": 16, "max_steps": STEPS, "save_steps": 1}


def train_shuffled(folder: str, kill: tuple | None) -> None:
    torch.manual_seed(3)
    make_trainer(folder, SETTINGS, kill, model=Shuffled()).train()


def finished(folder) -> dict:
    assert run_ranks(train_shuffled, str(folder), None, world_size=4) == [0] * 4
    return outcome(folder, STEPS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_run_that_is_killed_at_any_step_ends_with_the_same_bits(step, whole, tmp_path):
    folder, kill = str(tmp_path / "run"), (2, step)
    codes = run_ranks(train_shuffled, folder, kill, world_size=4, never_end=[0, 1, 3])
    assert codes[2] == -signal.SIGKILL
    assert 0 not in codes  # the others may have seen it before they were ended
    assert finished(tmp_path / "run") == whole


def test_a_bare_loop_that_restores_the_same_state_ends_with_other_bits(tmp_path):
    """The negative control: the same model, in DistributedDataParallel."""
    whole, again = ends_with(tmp_path / "whole"), ends_with(tmp_path / "again")
    assert whole == again
    assert ends_with(tmp_path / "cut", CUT) != whole
