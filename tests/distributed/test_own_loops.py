"""A loop over steps() or epochs() on several ranks goes on exactly, and ends where ranks part."""

from __future__ import annotations

import signal
from itertools import product
from pathlib import Path

import pytest

from distributed.own_loops import go_astray, stop_in_an_evaluation, train_on_a_rank
from distributed.ranks import run_ranks
from small_trainers import steps_in

KILLED = -signal.SIGKILL
CASES = [
    pytest.param(*case, marks=[pytest.mark.sweep] if case[-1] == (True, False) else [])
    for case in product(("ddp", "fsdp2"), ("steps", "epochs"), ((True, True), (True, False)))
]


def bits(folder: Path) -> list[bytes]:
    return [(folder / f"bits.{rank}").read_bytes() for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    known = {}

    def run(wrapper, loop):
        if (wrapper, loop) not in known:
            folder = tmp_path_factory.mktemp("whole")
            run_ranks(train_on_a_rank, str(folder), wrapper, loop, 0, of_rank=[False, False])
            known[wrapper, loop] = bits(folder)
        return known[wrapper, loop]

    return run


@pytest.mark.parametrize(("wrapper", "loop", "kills"), CASES)
def test_a_loop_on_ranks_that_are_killed_ends_with_the_same_bits(
    wrapper, loop, kills, whole, tmp_path
):
    arguments = (str(tmp_path), wrapper, loop, 3)
    assert KILLED in run_ranks(train_on_a_rank, *arguments, of_rank=kills)
    assert run_ranks(train_on_a_rank, *arguments, of_rank=[False, False]) == [0, 0]
    assert bits(tmp_path) == whole(wrapper, loop)
    told = (tmp_path / "told.0").read_text()
    assert "(step 2): exact" in told
    assert "step 3 repeated with the same bits" in told


def test_other_ranks_give_other_bits(whole):
    assert whole("ddp", "steps")[0] != whole("ddp", "epochs")[0]
    assert whole("ddp", "steps")[0] != whole("ddp", "steps")[1]  # the generators are each rank's


def astray(way, wrapper, tmp_path):
    codes = run_ranks(go_astray, way, wrapper, str(tmp_path), timeout=20.0)
    return codes, [(tmp_path / f"how.{rank}").read_text() for rank in (0, 1)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_continue_on_one_rank_alone_ends_all_with_an_error_that_names_it(wrapper, tmp_path):
    codes, (here, there) = astray("continue", wrapper, tmp_path)
    assert codes == [1, 1]
    assert "no answer within 2 s" in here
    assert "this rank has ended its turn without a step" in here
    assert "RuntimeError" in there  # of its collective, which rank 0 does not take part in
    assert steps_in(tmp_path / "run") == [2]


def test_a_step_on_one_rank_alone_is_found_at_the_end_of_the_turn(tmp_path):
    codes, told = astray("continue after the backward pass", "ddp", tmp_path)
    assert codes == [1, 1]
    for one in told:
        assert "the step of the loop: expected 2 (rank 0), found 3 (rank 1)" in one
        assert "on all ranks in the same turns" in one
    assert steps_in(tmp_path / "run") == [2]


def test_break_on_one_rank_alone_ends_the_others_soon(tmp_path):
    codes, (_, there) = astray("break", "ddp", tmp_path)
    assert codes[1] == 1
    assert "RuntimeError" in there
    assert steps_in(tmp_path / "run") == [2]


def test_stop_on_one_rank_stops_all_at_the_same_step(tmp_path):
    codes, told = astray("stop", "ddp", tmp_path)
    assert (codes, told) == ([0, 0], ["3 ended well"] * 2)
    assert steps_in(tmp_path / "run") == [2, 3]


def test_stop_on_one_rank_behind_the_batches_stops_all_at_the_edge_of_the_epoch(tmp_path):
    assert run_ranks(stop_in_an_evaluation, str(tmp_path), timeout=20.0) == [0, 0]
    assert [(tmp_path / f"how.{rank}").read_text() for rank in (0, 1)] == ["3", "3"]
    assert steps_in(tmp_path / "run") == [2, 3]
