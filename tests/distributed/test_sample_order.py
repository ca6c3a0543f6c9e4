"""The order of the data is one and the same, however steps are cut among ranks and workers."""

from __future__ import annotations

from itertools import product

import pytest

from distributed.ranks import run_ranks
from distributed.sample_order import (
    ACCUMULATIONS,
    BATCH,
    SAMPLES,
    STEPS,
    WORKERS,
    WORLDS,
    go_on,
    use_in_all_ways,
    used_by_all,
)
from scenarios import metrics

WAYS = [("map", *way) for way in product(WORLDS, WORKERS, ACCUMULATIONS)]
WAYS += [("stream", world_size, 0, parts) for world_size, parts in product(WORLDS, ACCUMULATIONS)]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The folder with the runs of all ways."""
    folder = tmp_path_factory.mktemp("table")
    for world_size in WORLDS:
        codes = run_ranks(use_in_all_ways, str(folder), world_size=world_size, timeout=120)
        assert codes == [0] * world_size
    return folder


@pytest.mark.parametrize(("data", "world_size", "workers", "accumulation"), WAYS)
def test_each_step_has_the_same_samples_in_the_same_order(
    data, world_size, workers, accumulation, table
):
    plain = used_by_all(table / f"{data}-1-0-1", 1)
    assert list(plain) == list(range(1, STEPS + 1))
    folder = table / f"{data}-{world_size}-{workers}-{accumulation}"
    assert used_by_all(folder, world_size) == plain
    assert [line["step"] for line in metrics(folder / "run")] == list(plain)


@pytest.mark.parametrize("data", ["map", "stream"])
def test_each_epoch_uses_every_sample_once(data, table):
    used = [one for step in used_by_all(table / f"{data}-1-0-1", 1).values() for one in step]
    assert len(used) == STEPS * BATCH
    for epoch in range(len(used) // SAMPLES):
        assert sorted(used[epoch * SAMPLES :][:SAMPLES]) == list(range(SAMPLES))


def test_a_map_style_data_set_is_shuffled_and_a_stream_is_not(table):
    """The negative control: orders that differ are told apart."""
    map_style, stream = (used_by_all(table / f"{data}-1-0-1", 1) for data in ("map", "stream"))
    assert map_style != stream
    assert stream[1] == list(range(BATCH))


@pytest.mark.parametrize("data", ["map", "stream"])
@pytest.mark.parametrize("worlds", [(2, 4, 1), (4, 1, 2), (1, 2, 4)])
def test_other_ranks_go_on_in_the_middle_of_an_epoch_in_the_same_order(
    worlds, data, table, tmp_path
):
    used = {}
    for world_size, until in zip(worlds, (1, 4, STEPS), strict=True):
        arguments = (str(tmp_path), data, until)
        codes = run_ranks(go_on, *arguments, world_size=world_size)
        assert codes == [0] * world_size
        used |= used_by_all(tmp_path / f"{data}-{world_size}", world_size)
    assert used == used_by_all(table / f"{data}-1-0-1", 1)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(used)
