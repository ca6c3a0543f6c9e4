"""One checkpoint, many ranks: the work is divided, damage is told to all, views may differ."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distributed.ranks import run_ranks
from distributed.shared_storage_views import (
    PIECE,
    PIECES,
    STEPS,
    begin_elsewhere_and_go_on,
    flip,
    folders,
    measure_resume,
    resume_there,
    resume_what_rank_1_refuses,
    starts,
    train_there,
)
from scenarios import outcome

FAILED = 3
TENSORS = ["model.1.weight", "model.2.weight", "optimizer.state.1.weight.exp_avg"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run of two ranks with checkpoints 0, 2, 4 and 6; nobody changes it."""
    folder = tmp_path_factory.mktemp("whole") / "0"
    folder.mkdir()
    assert run_ranks(train_there, str(folder), {}) == [0, 0]
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The same run, of which the last checkpoint is gone: four steps of six are done."""
    shutil.copytree(run, tmp_path / "0")
    shutil.rmtree(tmp_path / "0" / "run" / f"checkpoint-{STEPS}")
    return tmp_path / "0"


def errors_of(places: list[str]) -> list[str]:
    return [(Path(place) / "error").read_text() for place in places]


def went_on(places: list[str], settings: dict | None = None) -> bool:
    codes = run_ranks(train_there, settings or {}, of_rank=places, world_size=len(places))
    return codes == [0] * len(places)


def rejected(copy: Path) -> list[tuple[str, str]]:
    return [(one["checkpoint"], one["reason"]) for one in starts(copy / "run")[-1]["rejected"]]


def test_damage_is_found_by_one_of_the_ranks_and_told_by_all(run, copy, tmp_path):
    finders = set()
    for tensor in TENSORS:
        again = shutil.copytree(copy, tmp_path / tensor)
        flip(again / "run", 4, tensor)
        assert went_on([str(again)] * 2)
        assert outcome(again / "run", STEPS) == outcome(run / "run", STEPS)
        ((folder, reason),) = rejected(again)
        assert (folder, tensor in reason) == ("checkpoint-4", True)
        finders.add(reason[:6])
    assert finders == {"rank 0", "rank 1"}  # each has its part of the work


def test_a_damaged_copy_that_one_rank_alone_reads_is_found(run, copy, tmp_path):
    places = folders(tmp_path, 1)
    flip(Path(places[1]) / "run", 4, "model.2.weight")
    assert went_on(places)
    assert [(name, reason[:6]) for name, reason in rejected(copy)] == [("checkpoint-4", "rank 1")]
    assert outcome(copy / "run", STEPS) == outcome(run / "run", STEPS)


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_copy_is_verified_whole_by_the_rank_that_reads_it(tensor, copy, tmp_path):
    places = folders(tmp_path, 1)
    flip(Path(places[0]) / "run", 4, tensor)
    assert went_on(places)
    assert rejected(copy)[0][1].startswith("rank 0")


def test_a_checkpoint_that_one_rank_does_not_see_is_passed_over(run, copy, tmp_path):
    places = folders(tmp_path, 1)
    shutil.rmtree(Path(places[1]) / "run" / "checkpoint-4")
    assert went_on(places)
    assert "rank 1" in rejected(copy)[0][1]
    assert "no such checkpoint" in rejected(copy)[0][1]
    assert outcome(copy / "run", STEPS) == outcome(run / "run", STEPS)


def test_another_checkpoint_under_the_same_name_is_an_error_on_all_ranks(copy, tmp_path):
    (tmp_path / "1").mkdir()
    other = str(tmp_path / "1")
    assert run_ranks(train_there, other, {"max_steps": 4}) == [0, 0]
    places = [str(copy), other]
    assert run_ranks(train_there, {}, of_rank=places) == [FAILED] * 2
    for text in errors_of(places):
        assert text.startswith("RankError: rank 1: the manifest of checkpoint-4: expected")


def test_a_run_that_one_rank_does_not_see_is_an_error_that_says_what_to_do(copy, tmp_path):
    (tmp_path / "1").mkdir()
    places = [str(copy), str(tmp_path / "1")]
    assert run_ranks(train_there, {}, of_rank=places) == [FAILED] * 2
    first, second = errors_of(places)
    assert first.startswith("RankError: rank 1: open the run directory: RunDirectoryError")
    assert 'read_from="rank0"' in second


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_do_not_see_the_run_go_on_from_what_rank_0_sends(world_size, run, tmp_path):
    shutil.copytree(run, tmp_path / "0")
    shutil.rmtree(tmp_path / "0" / "run" / f"checkpoint-{STEPS}")
    empty = [tmp_path / str(rank) for rank in range(1, world_size)]
    for folder in empty:
        folder.mkdir()
    settings = {"read_from": "rank0"}
    assert went_on([str(tmp_path / "0"), *map(str, empty)], settings)
    assert [list(folder.iterdir()) for folder in empty] == [[]] * len(empty)
    if world_size == 2:
        assert outcome(tmp_path / "0" / "run", STEPS) == outcome(run / "run", STEPS)


@pytest.mark.parametrize("which", ["auto", 1])
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_every_byte_that_rank_0_saved(world_size, which, tmp_path):
    places = [tmp_path / str(rank) for rank in range(world_size)]
    for place in places:
        place.mkdir()
    names = [str(place) for place in places]
    codes = run_ranks(resume_there, which, of_rank=names, world_size=world_size)
    assert codes == [0] * world_size
    told = [json.loads((place / "resumed").read_text()) for place in places]
    saved = {one[0] for one in told}
    assert {one[1] for one in told} == saved
    assert {one[2] for one in told}.isdisjoint(saved)  # they had something else before
    assert {one[3] for one in told} == {repr({"numbers": (1, None), "bytes": b"\0" * 100_000})}


def test_damage_that_rank_0_finds_sends_all_to_the_next_older_one(run, copy, tmp_path):
    (tmp_path / "1").mkdir()
    flip(copy / "run", 4, "optimizer.state.1.weight.exp_avg")
    assert went_on([str(copy), str(tmp_path / "1")], {"read_from": "rank0"})
    assert outcome(copy / "run", STEPS) == outcome(run / "run", STEPS)
    assert rejected(copy)[0][0] == "checkpoint-4"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"resume_from_checkpoint": 4}, "CorruptCheckpointError: "),
        ({"resume_from_checkpoint": 5}, "no such checkpoint"),
        ({"optim": "sgd"}, "DifferenceError"),
    ],
    ids=["damaged", "missing", "changed"],
)
def test_what_rank_0_cannot_load_is_an_error_on_all(settings, words, copy, tmp_path):
    (tmp_path / "1").mkdir()
    flip(copy / "run", 4, "model.1.weight")
    places = [str(copy), str(tmp_path / "1")]
    more = {"read_from": "rank0", **settings}
    assert run_ranks(train_there, more, of_rank=places) == [FAILED] * 2
    own, other = errors_of(places)
    assert words in own
    assert words in other
    assert "rank 0" in other or words == "DifferenceError"  # which each rank sees for itself


@pytest.mark.disk
@pytest.mark.parametrize("holds_all", [False, True], ids=["streamed", "held whole"])
def test_a_rank_needs_the_memory_of_one_tensor_besides_its_model(holds_all, tmp_path):
    places = [tmp_path / str(rank) for rank in (0, 1)]
    for place in places:
        place.mkdir()
    names = [str(place) for place in places]
    assert run_ranks(measure_resume, holds_all, of_rank=names) == [0, 0]
    growth = int((places[1] / "growth").read_text())
    assert (growth <= 2 * PIECE) is not holds_all
    assert (growth >= PIECES * PIECE) is holds_all  # the measurement sees what is held


@pytest.mark.parametrize(("versions", "code"), [("11", 0), ("12", FAILED)], ids=["same", "other"])
def test_a_rank_with_another_version_of_a_package_is_named(versions, code, copy, tmp_path):
    places = folders(tmp_path, 1)
    for place, version in zip(places, versions, strict=True):
        (Path(place) / "timm.py").write_text(f'__version__ = "{version}.0"')
    assert run_ranks(train_there, {}, of_rank=places) == [code] * 2
    for text in [] if code == 0 else errors_of(places):
        assert 'rank 1: versions.packages.timm: expected "1.0" (rank 0), found "2.0"' in text


@pytest.mark.parametrize("read_from", ["all", "rank0"])
def test_what_one_rank_refuses_has_changed_nothing_on_any(read_from, tmp_path):
    codes = run_ranks(resume_what_rank_1_refuses, str(tmp_path), read_from)
    told = [json.loads((tmp_path / f"told-{rank}").read_text()) for rank in range(2)]
    assert codes == [0, 0]
    assert [one["error"] for one in told] == ["RankError", "DataError"]
    assert [one["changed"] for one in told] == [False, False]
    assert (tmp_path / "run" / "checkpoint-2").exists()


@pytest.mark.parametrize(("read_from", "how"), [("all", "copy"), ("rank0", "path")])
def test_all_ranks_begin_elsewhere_and_then_go_on(read_from, how, tmp_path):
    assert run_ranks(begin_elsewhere_and_go_on, str(tmp_path), read_from, how) == [0, 0]
    told = [json.loads((tmp_path / f"told-{rank}").read_text()) for rank in range(2)]
    assert told == [[8, 10], [8, 10]]
