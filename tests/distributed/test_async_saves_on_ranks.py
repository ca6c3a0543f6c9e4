"""Saves beside the training of several ranks: the bytes of their step, or no checkpoint."""

from __future__ import annotations

import json
import random
import threading
from itertools import product
from pathlib import Path

import pytest
from torch.distributed import HashStore

from distributed import async_saves as acts
from distributed.ranks import run_ranks
from unbroken.checkpoint.save.async_saver import StepRendezvous
from unbroken.distributed import StoreGroup
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader

LAYOUTS = ["ddp-2", "fsdp-2"]
BESIDE = ["async", "overlap"]


def told(folder: Path, act, *arguments, world_size: int = 2, code: int = 0) -> list:
    """Run an act on all ranks; return what each of them found."""
    codes = run_ranks(act, str(folder), *arguments, world_size=world_size)
    assert codes == [code] * world_size
    paths = [folder / f"found-{rank}.json" for rank in range(world_size)]
    return [json.loads(path.read_text()) for path in paths]


AT_FULL_SPEED = [*product(LAYOUTS, BESIDE), ("tp-2", "overlap"), ("fsdp-2-tp-2", "overlap")]


@pytest.mark.parametrize(("layout", "mode"), AT_FULL_SPEED)
def test_a_checkpoint_holds_the_bytes_of_its_step_at_full_speed(layout, mode, tmp_path):
    world_size = 4 if layout == "fsdp-2-tp-2" else 2
    for found in told(tmp_path, acts.save_at_full_speed, layout, mode, world_size=world_size):
        assert found["differing"] == {str(step): [] for step in range(3, 20, 3)}
        assert (found["copies beside"] > 6) == (mode == "overlap")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_the_hook_of_the_optimizer_it_would_hold_others(layout, tmp_path):
    found = told(tmp_path, acts.save_without_waiting_for_the_copy, layout)
    assert any(path.startswith("optimizer.") for differing in found for path in differing)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_edit_on_one_rank_makes_all_save_again_at_the_same_later_step(layout, tmp_path):
    one, other = told(tmp_path, acts.edit_on_one_rank, layout)
    assert one == other
    assert one["steps"] == one["due"]
    assert one["differing"] == []


def test_an_edit_that_no_later_save_makes_good_is_an_error_on_all_ranks(tmp_path):
    for error in told(tmp_path, acts.edit_on_one_rank_at_last, "fsdp-2"):
        assert error.startswith("checkpoint-1: rank 1: was not made: tensors were changed")


@pytest.mark.parametrize("mode", BESIDE)
def test_a_full_disk_of_one_rank_is_raised_on_all_at_the_same_step(mode, tmp_path):
    one, other = told(tmp_path, acts.save_on_a_full_disk, "fsdp-2", mode)
    assert one.pop("error").startswith("RankError: rank 1: save: SaveError")
    assert other.pop("error").startswith("SaveError")
    assert one == other
    assert (one["steps"], one["differing"]) == ([one["at"]], [])


def test_hearing_of_saves_asks_nothing_of_the_other_ranks(tmp_path):
    one, other = told(tmp_path, acts.ask_while_a_save_runs, "fsdp-2")
    assert one == other
    assert one["calls"] == []


def test_an_error_of_one_rank_ends_all_while_a_save_waits_for_their_consent(tmp_path):
    one, other = told(tmp_path, acts.fail_on_one_rank, "fsdp-2", code=3)
    assert other["error"] == "rank 1 has failed"
    assert max(one["seconds"], other["seconds"]) < 15


@pytest.mark.parametrize("mode", BESIDE)
def test_a_script_that_ends_without_closing_keeps_the_last_save_of_all_ranks(mode, tmp_path):
    assert run_ranks(acts.forget_to_close, str(tmp_path), "fsdp-2", mode) == [0, 0]
    assert CheckpointReader(LocalStorage(tmp_path / "run"), "checkpoint-1").verify() == []


def heard_at(group: StoreGroup, edges: int, draw: random.Random) -> int:
    """Pass edges as fast as chance has it, with a save that is over at one of them."""
    rendezvous, over_at = StepRendezvous(), draw.randrange(edges)
    make = threading.Thread(target=lambda: rendezvous.agree(group))
    for edge in range(edges + 10):
        if edge == over_at:
            make.start()
        if rendezvous.is_here():
            make.join()
            return edge
    raise AssertionError("it was not heard of")


@pytest.mark.parametrize("seed", range(5))
def test_all_ranks_hear_of_a_save_at_the_same_edge(seed):
    store, found = HashStore(), {}

    def be(rank: int) -> None:
        group = StoreGroup(store, rank=rank, world_size=3)
        draw = random.Random(10 * seed + rank)
        found[rank] = [heard_at(group, 20, draw) for _ in range(10)]

    ranks = [threading.Thread(target=be, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert found[0] == found[1] == found[2]
