"""A stop or a save that is asked for inside a step waits for its end; and nothing is lost."""

from __future__ import annotations

import signal

import pytest

from distributed.accumulation import save_in_window, train_or_tell
from distributed.ranks import run_ranks
from distributed.training import STEPS, train
from scenarios import outcome
from unbroken.checkpoint import EXIT_STOPPED

MANY = {"lanes": 4, "micro_batch_size": 1}
FEW = {"micro_batch_size": 1}


def finished(folder, settings, world_size) -> dict:
    codes = run_ranks(train, str(folder), settings, world_size=world_size)
    assert codes == [0] * world_size
    found = outcome(folder, STEPS)
    return {key: found[key] for key in ("tensors", "metrics")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What runs end with that nobody stopped: in lanes, and on two ranks without."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        "lanes": finished(folder / "lanes", MANY, 1),
        "ranks": finished(folder / "ranks", FEW, 2),
    }


@pytest.mark.parametrize(
    ("kind", "settings", "world_size"),
    [("lanes", MANY, 1), ("lanes", MANY, 2), ("lanes", MANY, 4), ("ranks", FEW, 2)],
)
def test_a_signal_inside_a_step_saves_at_its_end(kind, settings, world_size, whole, tmp_path):
    run, kill = tmp_path / "run", (world_size - 1, 5, signal.SIGTERM)
    codes = run_ranks(train, str(run), settings, kill, world_size=world_size)
    assert codes == [EXIT_STOPPED] * world_size
    assert (run / "checkpoint-5").exists()
    assert finished(run, settings, world_size) == whole[kind]


@pytest.mark.parametrize(
    ("kind", "settings", "world_size"),
    [("lanes", MANY, 1), ("lanes", MANY, 2), ("ranks", FEW, 2)],
)
def test_a_save_inside_a_step_is_made_at_its_end(kind, settings, world_size, whole, tmp_path):
    run, asks = tmp_path / "run", (world_size - 1, 5)
    codes = run_ranks(save_in_window, str(run), settings, *asks, world_size=world_size)
    assert codes == [0] * world_size
    found = outcome(run, STEPS)
    assert {key: found[key] for key in ("tensors", "metrics")} == whole[kind]
    assert (run / "checkpoint-5").exists()
    assert not (run / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("world_size", "settings", "name"), [(1, MANY, "lanes"), (2, FEW, "world_size")]
)
def test_a_step_that_one_process_began_is_not_finished_by_many(
    world_size, settings, name, tmp_path
):
    run = tmp_path / "run"
    assert run_ranks(save_in_window, str(run), FEW, 0, 5, world_size=1) == [0]
    assert (run / "checkpoint-4").exists()
    codes = run_ranks(train_or_tell, str(run), settings, world_size=world_size)
    assert codes == [3] * world_size
    for rank in range(world_size):
        text = (tmp_path / f"run-error-{rank}").read_text()
        assert text.startswith(f"ConfigError: {name}: the checkpoint lies inside a step")
