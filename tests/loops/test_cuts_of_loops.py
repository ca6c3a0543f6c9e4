"""Wherever in a turn or an epoch a loop is killed, it ends with the bits of one that was not."""

from __future__ import annotations

import pytest

from loops.cut_loops import ended

IN_TURNS = [  # killed in the second turn of three starts, which each have saved one step more
    ("scaled", "stepped"),
    ("scaled", "updated"),
    ("without_an_optimizer", "turn"),
    ("two_optimizers", "between the two"),
    ("two_optimizers", "turn"),
]
IN_EPOCHS = [
    "before the batches of 0",
    "batch 0 of 0",
    "batch 1 of 0",
    "batch 2 of 0",
    "validation of 0",
    "edge of 0",
    "before the batches of 1",
    "batch 0 of 1",
    "edge of 1",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    known = {}

    def run(name):
        if name not in known:
            known[name] = ended(tmp_path_factory.mktemp("whole") / "run", name)
        return known[name]

    return run


@pytest.mark.parametrize(("loop", "place"), IN_TURNS)
def test_killed_within_any_turn_a_loop_ends_with_the_same_bits(loop, place, whole, tmp_path):
    assert ended(tmp_path / "cut", loop, place, turn=2, kills=3) == whole(loop)


@pytest.mark.parametrize("place", IN_EPOCHS)
def test_killed_at_any_place_of_an_epoch_it_ends_with_the_same_bits(place, whole, tmp_path):
    assert ended(tmp_path / "cut", "epochs", place, turn=1, kills=1) == whole("epochs")


def test_a_step_that_is_compiled_counts_and_goes_on_exactly(whole, tmp_path):
    assert ended(tmp_path / "cut", "compiled", "turn", turn=2, kills=1) == whole("compiled")


def test_a_turn_that_was_lost_would_be_seen(whole):
    steps, *_ = whole("two_optimizers").split(",")
    assert steps == "[[5"
    assert whole("two_optimizers") != whole("scaled")
