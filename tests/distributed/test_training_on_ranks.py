"""A run on several ranks: exact after any kill; in lanes the same bits on any number of ranks."""

from __future__ import annotations

import json
import signal

import pytest

from distributed.accumulation import train_or_tell
from distributed.ranks import run_ranks
from distributed.training import STEPS, train, train_by_own_clock, train_in_turn
from scenarios import metrics, outcome
from unbroken.checkpoint import EXIT_STOPPED
from unbroken.storage import LocalStorage
from unbroken.store import Catalog

LANES = {"lanes": 4}


def finished(folder, settings=None, world_size=2, kill=None) -> dict:
    codes = run_ranks(train, str(folder), settings or {}, kill, world_size=world_size)
    assert codes == [0] * world_size
    return outcome(folder, STEPS)


def killed(folder, settings: dict, kill: tuple, world_size: int = 2) -> None:
    """Run until a rank kills itself; then the others are ended, as torchrun ends them."""
    others = [rank for rank in range(world_size) if rank != kill[0]]
    codes = run_ranks(train, str(folder), settings, kill, world_size=world_size, never_end=others)
    assert codes[kill[0]] == -signal.SIGKILL
    assert 0 not in codes  # the others may have seen it before they were ended


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process in four lanes, and the same in two processes without lanes."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        "lanes": finished(folder / "lanes", LANES, world_size=1),
        "ranks": finished(folder / "ranks"),
    }


def told(outcome_of_run: dict) -> dict:
    """Return what must be the same bits: all tensors and metrics."""
    return {key: outcome_of_run[key] for key in ("tensors", "metrics")}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [1, 5, 7], ids=["first step", "mid-epoch", "second epoch"])
def test_a_killed_rank_and_the_same_command_again_end_with_the_same_bits(
    rank, step, alone, tmp_path
):
    killed(tmp_path / "run", {}, (rank, step))
    assert finished(tmp_path / "run") == alone["ranks"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_lanes_give_the_bits_of_one_process_on_any_number_of_ranks(
    world_size, workers, alone, tmp_path
):
    settings = {**LANES, "dataloader_num_workers": workers}
    many = finished(tmp_path / "run", settings, world_size)
    assert told(many) == told(alone["lanes"])


def test_without_lanes_another_number_of_ranks_rounds_otherwise(alone):
    """The negative control: four lanes and two ranks sum the same gradients in another order."""
    assert alone["ranks"]["tensors"] != alone["lanes"]["tensors"]


@pytest.mark.parametrize(
    "more",
    [{"micro_batch_size": 1}, {"bf16": True}, {"fp16": True}, {"optim": "sgd"}],
    ids=["accumulation", "bf16", "fp16", "sgd"],
)
def test_lanes_are_exact_with_accumulation_and_mixed_precision(more, tmp_path):
    settings = {**LANES, **more}
    runs = [finished(tmp_path / str(n), settings, world_size=n) for n in (1, 2)]
    assert told(runs[0]) == told(runs[1])


def test_four_then_two_then_one_then_four_ranks_end_with_the_bits_of_one(alone, tmp_path):
    for world_size, kill in ((4, (3, 5)), (2, (0, 7)), (1, (0, 8))):
        killed(tmp_path / "run", LANES, kill, world_size)
    assert told(finished(tmp_path / "run", LANES, world_size=4)) == told(alone["lanes"])


def test_another_number_of_ranks_is_harmless_with_lanes_and_told_without(tmp_path):
    for name, settings, expected in (("a", LANES, "exact"), ("b", {}, "equivalent")):
        finished(tmp_path / name, {**settings, "micro_batch_size": 2})
        finished(tmp_path / name, {**settings, "micro_batch_size": 2}, world_size=4)
        events = (tmp_path / name / "history.jsonl").read_text().splitlines()
        starts = [e for e in map(json.loads, events) if e["event"] == "started"]
        assert starts[-1]["verdict"] == expected


@pytest.mark.parametrize(("settings", "code"), [(LANES, 0), ({}, 3)], ids=["lanes", "ranks"])
def test_exact_resume_on_another_number_of_ranks_needs_lanes(settings, code, tmp_path):
    settings = {**settings, "micro_batch_size": 2, "lr_scheduler_type": "constant"}
    codes = run_ranks(train, str(tmp_path / "run"), {**settings, "max_steps": 4})
    assert codes == [0, 0]
    strict = {**settings, "exact_resume": "require"}
    codes = run_ranks(train_or_tell, str(tmp_path / "run"), strict, world_size=4)
    assert codes == [code] * 4
    for told in tmp_path.glob("run-error-*"):
        assert told.read_text().startswith("DifferenceError: checkpoint of step 4: ")
        assert "world_size" in told.read_text()


def test_evaluation_is_shared_and_has_the_same_bits(tmp_path):
    settings = {**LANES, "eval_steps": 4, "eval_batch_size": 3}
    runs = [finished(tmp_path / str(n), settings, world_size=n) for n in (1, 2)]
    assert told(runs[0]) == told(runs[1])
    assert [line["step"] for line in metrics(tmp_path / "2") if "eval_loss" in line] == [4, 8]


def test_a_signal_to_one_rank_stops_all_after_a_save(alone, tmp_path):
    kill = (1, 5, signal.SIGTERM)
    codes = run_ranks(train, str(tmp_path / "run"), {}, kill)
    assert codes == [EXIT_STOPPED] * 2
    assert (tmp_path / "run" / "checkpoint-5").exists()
    assert finished(tmp_path / "run") == alone["ranks"]


def test_metrics_are_written_once_by_one_rank(alone, tmp_path):
    killed(tmp_path / "run", {}, (1, 6))
    finished(tmp_path / "run")
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"seed_of_model": 9}, "weights"),
        ({"draws": 1}, "random generators"),
    ],
    ids=["configuration", "weights", "generators"],
)
def test_ranks_that_differ_are_told_on_every_rank(difference, words, tmp_path):
    codes = run_ranks(
        train_in_turn, str(tmp_path), of_rank=[{}, difference], world_size=2, timeout=40
    )
    assert codes == [3, 3]
    for rank in (0, 1):
        text = (tmp_path / f"error-{rank}").read_text()
        assert "RankError" in text
        assert words in text
        assert "rank 1" in text


def test_a_rank_that_is_stopped_ends_the_others_in_an_error_that_names_it(tmp_path):
    kill = {"kill": (1, 4, signal.SIGSTOP), "timeout": 3.0}
    codes = run_ranks(train_in_turn, str(tmp_path), of_rank=[kill, kill], never_end=[1], timeout=60)
    assert codes == [3, -signal.SIGKILL]
    assert "rank 1" in (tmp_path / "error-0").read_text()


def test_a_damaged_checkpoint_is_walked_past_by_all_ranks(alone, tmp_path):
    killed(tmp_path / "run", {}, (1, 8))
    weights = tmp_path / "run" / "checkpoint-6" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert finished(tmp_path / "run") == alone["ranks"]


@pytest.mark.parametrize("storage_step", [2, 8, 12, 16, 20])
def test_a_kill_of_the_writing_rank_inside_a_save_leaves_the_last_checkpoint(
    storage_step, alone, tmp_path
):
    setting = {"in_save": (6, storage_step)}
    codes = run_ranks(train_in_turn, str(tmp_path), of_rank=[setting, setting], never_end=[1])
    assert (codes[0], codes[1] in (-signal.SIGKILL, 3)) == (-signal.SIGKILL, True)
    newest, rejected = Catalog(LocalStorage(tmp_path / "run")).newest_intact()
    assert (newest.step in (3, 6), rejected) == (True, ())
    assert finished(tmp_path / "run") == alone["ranks"]


BY_TIME = {
    "auto": {"save_steps": "auto", "max_lost_minutes": 2},
    "a limit": {"save_steps": None, "max_lost_minutes": 2},
    "minutes": {"save_steps": None, "save_minutes": 2},
    "beside the training": {"save_steps": "auto", "max_lost_minutes": 2, "save_mode": "overlap"},
}


@pytest.mark.parametrize("settings", BY_TIME.values(), ids=BY_TIME)
def test_ranks_whose_clocks_differ_save_at_the_same_steps_and_the_bits_stay(
    settings, alone, tmp_path
):
    arguments = (train_by_own_clock, str(tmp_path / "run"), settings)
    assert run_ranks(*arguments, of_rank=[1, 2]) == [0, 0]
    assert told(outcome(tmp_path / "run", STEPS)) == told(alone["ranks"])
