"""An evaluation on several ranks gives what one process gives, each sample counted once."""

from __future__ import annotations

import json

import pytest

from distributed.accumulation import evaluate
from distributed.ranks import run_ranks

COUNTS = [1, 3, 10, 17, 16]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each rank of 1, 2 and 4 has told of each evaluation set."""
    folder = tmp_path_factory.mktemp("evaluated")
    found = {}
    for world_size in (1, 2, 4):
        codes = run_ranks(evaluate, str(folder), world_size=world_size)
        assert codes == [0] * world_size
        files = [folder / f"evaluated-{world_size}-{rank}" for rank in range(world_size)]
        found[world_size] = [json.loads(file.read_text()) for file in files]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("place", range(len(COUNTS)), ids=[f"{n} samples" for n in COUNTS])
def test_the_metric_has_the_bits_of_one_process_on_every_rank(place, world_size, told):
    ((alone, _),) = (rank[place] for rank in told[1])
    assert [rank[place][0] for rank in told[world_size]] == [alone] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("place", range(len(COUNTS)), ids=[f"{n} samples" for n in COUNTS])
def test_each_sample_is_evaluated_once(place, world_size, told):
    used = [round(10 * one) for rank in told[world_size] for one in rank[place][1]]
    assert sorted(used) == list(range(COUNTS[place]))


def test_other_samples_give_another_metric(told):
    assert len({metric for metric, _ in told[1][0]}) == len(COUNTS)
