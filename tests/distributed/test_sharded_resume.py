"""A run whose model is sharded over ranks goes on exactly after a kill, in fresh processes."""

from __future__ import annotations

import functools
import json
import signal
from itertools import product

import pytest

from distributed.ranks import run_ranks
from distributed.sharded_training import WORLDS, train
from distributed.training import STEPS
from scenarios import metrics, outcome

SETTINGS = {"micro_batch_size": 2, "save_steps": 3}
DROPOUT = 0.2
CUTS = {"first step": (1, 3), "mid-epoch": (5, 3), "epoch edge": (6, 5)}
ON_TWO = [(layout, cut) for layout in ("ddp", "fsdp", "tp") for cut in CUTS]
ON_FOUR = [(layout, "mid-epoch") for layout in ("fsdp x tp", "ddp x tp", "hsdp")]


def finished(layout: str, folder, left_out: str | None = None, dropout: float = DROPOUT) -> dict:
    world_size = WORLDS[layout]
    arguments = (layout, str(folder), SETTINGS, None, dropout, left_out)
    assert run_ranks(train, *arguments, world_size=world_size) == [0] * world_size
    return outcome(folder, STEPS)


def killed(layout: str, folder, cut: str, dropout: float = DROPOUT) -> None:
    """Train until the last rank kills itself; the others end in its error, or are ended."""
    (step, save_steps), last = CUTS[cut], WORLDS[layout] - 1
    arguments = (layout, str(folder), {**SETTINGS, "save_steps": save_steps}, (last, step), dropout)
    codes = run_ranks(train, *arguments, world_size=last + 1, never_end=range(last))
    assert codes[last] == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return what the runs end with that nobody touched, each trained when it is asked for."""

    @functools.cache
    def of(layout: str, dropout: float = DROPOUT) -> dict:
        return finished(layout, tmp_path_factory.mktemp("whole") / "run", dropout=dropout)

    return of


@pytest.mark.parametrize(("layout", "cut"), ON_TWO + ON_FOUR)
def test_a_killed_run_ends_with_the_same_bits(layout, cut, whole, tmp_path):
    killed(layout, tmp_path / "run", cut)
    assert finished(layout, tmp_path / "run") == whole(layout)


@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp", "tp"), ("tp", "fsdp"), ("ddp", "fsdp x tp"), ("fsdp x tp", "whole")],
)
def test_in_another_layout_a_run_goes_on_and_is_called_equivalent(before, after, whole, tmp_path):
    killed(before, tmp_path / "run", "mid-epoch", dropout=0.0)
    finished(after, tmp_path / "run", dropout=0.0)
    events = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert [e["verdict"] for e in events if e["event"] == "started"][1:] == ["equivalent"]
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    expected = whole("whole", dropout=0.0)["metrics"]
    assert losses == pytest.approx([line["loss"] for line in expected], rel=1e-5)


LEFT_OUT = [*product(("ddp", "fsdp", "tp", "fsdp x tp"), ("optimizer", "data"))]
LEFT_OUT += [("ddp x tp", "optimizer"), ("hsdp", "data")]


@pytest.mark.parametrize(("layout", "part"), LEFT_OUT)
def test_a_resume_that_leaves_a_part_out_ends_with_other_bits(layout, part, whole, tmp_path):
    """The negative control."""
    killed(layout, tmp_path / "run", "mid-epoch")
    left_out = finished(layout, tmp_path / "run", part)
    assert left_out["tensors"] != whole(layout)["tensors"]
