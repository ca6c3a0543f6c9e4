"""A run whose model is sharded over ranks goes on exactly after a kill, in fresh processes."""

from __future__ import annotations

import signal

import pytest

from distributed.ranks import run_ranks
from distributed.sharded_training import WORLDS, train
from distributed.training import STEPS
from scenarios import outcome

SETTINGS = {"micro_batch_size": 2, "save_steps": 3}
DROPOUT = 0.2
CUTS = {"first step": (1, 3), "mid-epoch": (5, 3), "epoch edge": (6, 5)}
ON_TWO = [(layout, cut) for layout in ("ddp", "fsdp", "tp") for cut in CUTS]
ON_FOUR = [(layout, "mid-epoch") for layout in ("fsdp x tp", "ddp x tp", "hsdp")]


def finished(layout: str, folder, left_out: str | None = None) -> dict:
    world_size = WORLDS[layout]
    arguments = (layout, str(folder), SETTINGS, None, DROPOUT, left_out)
    assert run_ranks(train, *arguments, world_size=world_size) == [0] * world_size
    return outcome(folder, STEPS)


def killed(layout: str, folder, cut: str) -> None:
    """Train until the last rank kills itself; the others end in its error, or are ended."""
    (step, save_steps), last = CUTS[cut], WORLDS[layout] - 1
    arguments = (layout, str(folder), {**SETTINGS, "save_steps": save_steps}, (last, step), DROPOUT)
    codes = run_ranks(train, *arguments, world_size=last + 1, never_end=range(last))
    assert codes[last] == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return what the runs end with that nobody touched, each trained when it is asked for."""
    runs: dict[str, dict] = {}

    def of(layout: str) -> dict:
        if layout not in runs:
            runs[layout] = finished(layout, tmp_path_factory.mktemp("whole") / "run")
        return runs[layout]

    return of


@pytest.mark.parametrize(("layout", "cut"), ON_TWO + ON_FOUR)
def test_a_killed_run_ends_with_the_same_bits(layout, cut, whole, tmp_path):
    killed(layout, tmp_path / "run", cut)
    assert finished(layout, tmp_path / "run") == whole(layout)


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "tp", "fsdp x tp"])
@pytest.mark.parametrize("part", ["optimizer", "data"])
def test_a_resume_that_leaves_a_part_out_ends_with_other_bits(layout, part, whole, tmp_path):
    """The negative control."""
    killed(layout, tmp_path / "run", "mid-epoch")
    left_out = finished(layout, tmp_path / "run", part)
    assert left_out["tensors"] != whole(layout)["tensors"]
