"""What ranks store once, what each stores for itself, and what each gets back: in one process."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from unbroken.capture import capture, capture_rng, decode, file_of, restore_rng
from unbroken.capture import structure_from_bytes as structure_of
from unbroken.checkpoint.resume.per_rank import reseed_rank, state_of_rank
from unbroken.checkpoint.save import rank_shares
from unbroken.checkpoint.save.rank_shares import (
    STATE_FILE,
    CapturedState,
    SharePlan,
    plan_share,
    sample_of,
)
from unbroken.checkpoint.save.session import Layout, SaveLineage, SaveRequest, SaveSession
from unbroken.distributed import StoreGroup
from unbroken.errors import RankError
from unbroken.storage import MemoryStorage
from unbroken.store import CheckpointReader, KeepPolicy, RunDirectory


@pytest.mark.parametrize("numel", [3086, 3087, 4001], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_every_byte_of_a_large_tensor_is_compared_in_some_save_and_no_other(dtype, numel):
    memory = torch.zeros(numel + 20, dtype=dtype)
    block = memory[10:-10].nbytes // 4 - 30  # 31 places for each of four blocks
    for save in range(200):
        sample_of(memory[10:-10], save, block=block).fill_(1)
    assert memory[10:-10].view(torch.uint8).all()
    assert not memory[:10].any()
    assert not memory[-10:].any()


def on_two_ranks(act: Callable[[StoreGroup], object]) -> list:
    store = HashStore()
    groups = [StoreGroup(store, rank=rank, world_size=2) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(act, groups))


def seen_in(save: int, like: torch.Tensor) -> torch.Tensor:
    marks = torch.zeros_like(like)
    sample_of(marks, save).fill_(1)
    return marks != 0


def saves_until_it_is_refused(drift: torch.Tensor, group: StoreGroup) -> int:
    model, plan = nn.Linear(64, 64, bias=False), SharePlan()
    model.weight.data = drift * group.rank
    tree = {**capture({"model": model}), "rng": None, "values": None}
    for save in range(3):
        try:
            plan_share(group, CapturedState(tree), file_of, plan)
        except RankError:
            return save
    return -1


def test_each_save_compares_other_places_of_a_large_tensor(monkeypatch):
    monkeypatch.setattr(rank_shares, "_FEW", 0)
    like = torch.zeros(64, 64)
    for save in (0, 1, 2):
        before = [seen_in(one, like) for one in range(save)]
        new = seen_in(save, like) & ~torch.stack([*before, torch.zeros_like(like) != 0]).any(0)
        assert new.any()
        assert on_two_ranks(partial(saves_until_it_is_refused, new.float())) == [save, save]


NAMES = ("noise", "rng", "values", "attributes")


def state_of(rank: int) -> dict:
    """What a rank has: the model as all have it, and the rest for itself."""
    own = {"noise": torch.Generator().manual_seed(rank), "model": nn.Linear(1, 1)}
    own["model"].weight.data.fill_(7)
    own["model"].bias.data.fill_(8)
    random.seed(rank)
    rest = {"rng": capture_rng(), "values": {"of": rank}, "attributes": {"plain": {"a": [rank]}}}
    return {**capture(own), **rest}


def read(reader: CheckpointReader, name: str) -> dict:
    return decode(structure_of(reader.read_file(name), name), reader)


def save(run: RunDirectory, trees: list, per_rank, group: StoreGroup) -> None:
    request = SaveRequest(1, Layout(file_of), {}, KeepPolicy(), {}, time.time)
    state = CapturedState(trees[group.rank], per_rank)
    with SaveSession(run, request, state, SharePlan(), SaveLineage()) as session:
        session.run(group)
    assert session.without_storage == ()


def loaded(storage: MemoryStorage, per_rank, alike: bool, rank: int, size: int) -> tuple:
    reader = CheckpointReader(storage, "checkpoint-1")
    group = StoreGroup(HashStore(), rank=rank, world_size=size)
    tree, of_a_file = read(reader, STATE_FILE), partial(read, reader)
    own, anew, _ = state_of_rank(
        tree, reader.manifest, group, per_rank, of_a_file, read_by_rank_0=alike
    )
    return spelled({name: {**tree, **own}[name] for name in NAMES}), anew


def spelled(tree: dict) -> tuple:
    words = tuple(tree["rng"]["python"]["words"])
    return (
        *(tree["noise"].state["state"].sum().item(), words),
        *(tree["values"], tree["attributes"]),
    )


@pytest.mark.parametrize("alike", [False, True], ids=["each reads", "rank 0 reads"])
@pytest.mark.parametrize("per_rank", [None, ("noise", "rng", "values")], ids=["found", "named"])
def test_each_rank_gets_back_what_it_had_and_not_what_another_had(per_rank, alike):
    state, storage = capture_rng(), MemoryStorage()
    trees = [state_of(rank) for rank in (0, 1)]
    restore_rng(state)
    with RunDirectory.open(storage) as run:
        on_two_ranks(partial(save, run, trees, per_rank))
    expected = [spelled(tree) for tree in trees]
    assert expected[0] != expected[1]
    for rank in (0, 1):
        assert loaded(storage, per_rank, alike, rank, 2) == (expected[rank], False)


@pytest.fixture
def _generators_stay():
    state = capture_rng()
    yield
    restore_rng(state)


@pytest.mark.usefixtures("_generators_stay")
def test_ranks_that_are_new_draw_numbers_of_their_own_and_the_same_in_each_start():
    stored = capture_rng()

    def drawn(rank: int, rng: dict) -> tuple[float, float, float]:
        reseed_rank(rng, rank)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, again, other = drawn(2, stored), drawn(2, stored), drawn(3, stored)
    assert first == again
    random.seed(5)
    for numbers in (other, drawn(2, capture_rng())):
        assert not set(first) & set(numbers)
