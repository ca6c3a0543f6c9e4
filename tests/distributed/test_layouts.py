"""Every layout of ranks goes on exactly, and loads into every other, weights and optimizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distributed.ranks import run_ranks
from distributed.sharded import (
    LAYOUTS,
    LOSSES,
    WORLDS,
    go_on_all,
    in_group,
    load_all,
    save_all,
)


def in_every_world(function, folder: Path) -> Path:
    for world_size in WORLDS:
        codes = run_ranks(in_group, function, str(folder), world_size=world_size)
        assert codes == [0] * world_size
    return folder


def told(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run of each layout with a checkpoint, and what the tensors were then and at the end."""
    return in_every_world(save_all, tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def gone_on(saved) -> Path:
    return in_every_world(go_on_all, saved)


@pytest.fixture(scope="module")
def loaded(gone_on) -> Path:
    return in_every_world(load_all, gone_on)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_resumed_in_fresh_processes_ends_with_the_same_bits(layout, gone_on):
    whole, resumed = told(gone_on, layout), told(gone_on, f"{layout} after losing nothing")
    assert resumed["losses"] == whole["losses"]
    assert resumed["end"] == whole["end"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "nothing"])
def test_a_run_that_lost_one_piece_of_state_ends_with_other_bits(layout, loss, gone_on):
    """The negative control: each piece counts in each layout."""
    lost = told(gone_on, f"{layout} after losing {loss}")
    assert lost["end"] != told(gone_on, layout)["end"]


@pytest.mark.parametrize("here", LAYOUTS)
@pytest.mark.parametrize("there", LAYOUTS)
def test_what_one_layout_saved_another_one_has_to_the_bit(there, here, loaded):
    assert told(loaded, f"{there} into {here}")["saved"] == told(loaded, there)["saved"]


@pytest.mark.parametrize("here", LAYOUTS)
@pytest.mark.parametrize("there", LAYOUTS)
def test_another_layout_is_told_and_the_same_is_not(there, here, loaded):
    differs = told(loaded, f"{there} into {here}")["differs"]
    assert set(differs) <= {"environment.world_size", "environment.mesh"}
    assert set(differs.values()) == (set() if here == there else {"equivalent"})


def test_no_two_layouts_saved_the_same(saved):
    """The negative control: what is loaded is told apart from what another layout saved."""
    ends = [json.dumps(told(saved, layout)["saved"]) for layout in LAYOUTS]
    assert len(set(ends)) == len(LAYOUTS)
