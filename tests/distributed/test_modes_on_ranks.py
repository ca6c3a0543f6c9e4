"""A rank that evaluates by itself just before a save is saved and resumed as it was."""

from __future__ import annotations

import os

import pytest
from torch import nn

from distributed.ranks import run_ranks
from unbroken import Checkpointer
from unbroken.checkpoint import RankPolicy
from unbroken.distributed import join


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)))


def modes(modules: list) -> list[bool]:
    return [part.training for one in (modules[0], modules[1]["inner"]) for part in one.modules()]


def on_a_rank(folder: str, per_rank: list[str] | None) -> None:
    """Save where a part of a model evaluates on rank 0, and resume where all train, or none."""
    group, found = join(), []
    for trains in (True, False):
        where, parts = f"{folder}/{trains}", {"ranks": RankPolicy(group, per_rank=per_rank)}
        before, after = [model(), {"inner": model()}], [model(), {"inner": model()}]
        with Checkpointer(where, **parts, models=before) as checkpointer:
            checkpointer.resume()
            before[1]["inner"][1].train(group.rank > 0)
            checkpointer.save(1)
        after[0].train(trains)
        after[1]["inner"].train(trains)
        with Checkpointer(where, **parts, models=after) as checkpointer:
            checkpointer.resume("must")
        found.append(modes(after) == modes(before))
    os._exit(0 if all(found) else 3)


@pytest.mark.parametrize("per_rank", [None, ["rng"]])
def test_a_rank_that_evaluates_alone_before_a_save_is_no_error_and_comes_back(per_rank, tmp_path):
    assert run_ranks(on_a_rank, str(tmp_path), per_rank) == [0, 0]
