"""Loaders that give each rank its own batches go on exactly on each; samples go on anywhere."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from distributed.loaders_per_rank import STEPS, train
from distributed.ranks import run_ranks
from scenarios import metrics, outcome
from unbroken.data import BatchShape, CountedSource, Position
from unbroken.distributed import StoreGroup
from unbroken.training.checkpoints import exchange_loader_states

FAILED = 3


def run(name, folder, world_size=2, settings=None) -> list[int]:
    arguments = (str(folder), settings or {})
    return run_ranks(train, name, *arguments, world_size=world_size)


def finished(name, folder, world_size=2, settings=None) -> dict:
    assert run(name, folder, world_size, settings) == [0] * world_size
    return outcome(folder, STEPS)


def killed(name, folder, rank, step, world_size=2, settings=None) -> None:
    others = [other for other in range(world_size) if other != rank]
    arguments = (name, str(folder), settings or {}, (rank, step))
    codes = run_ranks(train, *arguments, world_size=world_size, never_end=others)
    assert codes[rank] == -signal.SIGKILL
    assert 0 not in codes  # the others may have seen it before they were ended


def errors(folder, world_size=2) -> list[str]:
    names = [folder.with_name(f"{folder.name}-error-{rank}") for rank in range(world_size)]
    return [name.read_text() for name in names]


@pytest.mark.parametrize("name", ["own stream", "own stream with workers", "stateful"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_goes_on_where_its_own_loader_stood(name, world_size, tmp_path):
    whole = finished(name, tmp_path / "whole", world_size)
    killed(name, tmp_path / "run", world_size - 1, 8, world_size)
    assert finished(name, tmp_path / "run", world_size) == whole
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == list(range(1, STEPS + 1))


def test_a_loader_that_forgets_its_place_ends_elsewhere(tmp_path):
    """The negative control: what each rank stored is what it goes on from."""
    whole = finished("stateful", tmp_path / "whole")
    killed("stateful", tmp_path / "run", 1, 8)
    again = finished("forgetful", tmp_path / "run", settings={"allow": ["data"]})
    assert again["tensors"] != whole["tensors"]


@pytest.mark.parametrize("name", ["own stream", "stateful"])
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1), (1, 2)])
def test_own_batches_on_other_ranks_are_refused_by_name(name, before, after, tmp_path):
    settings = {"lr_scheduler_type": "constant"}
    assert run(name, tmp_path / "run", before, {**settings, "max_steps": 4}) == [0] * before
    assert run(name, tmp_path / "run", after, settings) == [FAILED] * after
    for text in errors(tmp_path / "run", after):
        assert text.startswith("DataError: data.world_size: a loader that gives each rank its own")
        assert text.endswith(f"expected {before}, as saved, found {after}")


def test_samples_are_dealt_to_any_number_of_ranks(tmp_path):
    lanes = {"lanes": 4, "micro_batch_size": 2}
    whole = finished("samples", tmp_path / "whole", 1, lanes)
    for world_size, step in ((4, 4), (2, 6), (1, 8)):
        killed("samples", tmp_path / "run", 0, step, world_size, lanes)
    many = finished("samples", tmp_path / "run", 4, lanes)
    assert [many[key] for key in ("tensors", "metrics")] == [
        whole[key] for key in ("tensors", "metrics")
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [("same batches", "gives all ranks the same batches"), ("own samples", "other samples")],
)
def test_a_loader_that_deals_wrongly_is_refused_before_the_first_step(name, words, tmp_path):
    assert run(name, tmp_path / "run") == [FAILED] * 2
    for text in errors(tmp_path / "run"):
        assert text.startswith("DataError: train_dataset: ")
        assert words in text


def test_ranks_that_share_a_part_of_the_data_store_one_place():
    def told(rank: int) -> list[int]:
        shape = BatchShape(8, 2, rank // 2, 2)  # ranks 0, 1 and 2, 3 are tensor parallel
        source = CountedSource([[1, 2], [3, 4]], seed=0, shape=shape)
        source.position = Position(samples=8, taken=1 + rank // 2)
        exchange_loader_states(source, members[rank])
        again = CountedSource([[1, 2], [3, 4]], seed=0, shape=shape)
        again.load_state_dict(source.state_dict())
        return [len(source.rank_states), again.position.taken]

    store = HashStore()
    members = [StoreGroup(store, rank=rank, world_size=4) for rank in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(told, range(4))) == [[2, 1], [2, 1], [2, 2], [2, 2]]
        list(pool.map(StoreGroup.close, members))
