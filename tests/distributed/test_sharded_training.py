"""A model that is sharded over ranks learns what the whole one learns, from the same data."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from distributed.ranks import run_ranks
from distributed.sharded_training import (
    REFUSED,
    SHARDED,
    WORLDS,
    refused,
    run_the_document,
    train,
    train_until_a_rank_is_gone,
)
from scenarios import metrics

# Seven batches to evaluate on: of two parts one has a batch less.
SETTINGS = {
    "micro_batch_size": 1,
    "eval_steps": 4,
    "eval_batch_size": 6,
    "save_steps": None,
    "load_best_model_at_end": True,
}
ROUNDED = ("loss", "grad_norm", "eval_loss")


def lines(folder, layout: str, **settings) -> list[dict]:
    world_size = WORLDS[layout]
    arguments = (layout, str(folder), {**SETTINGS, **settings})
    assert run_ranks(train, *arguments, world_size=world_size) == [0] * world_size
    return metrics(folder)


def parted(lines: list[dict]) -> tuple[list[dict], list[float]]:
    """Return what must be the same bits, and what may be rounded otherwise."""
    exact = [{k: v for k, v in line.items() if k not in ROUNDED} for line in lines]
    return exact, [line[name] for line in lines for name in ROUNDED if name in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return lines(tmp_path_factory.mktemp("whole") / "run", "whole")


@pytest.mark.parametrize("layout", SHARDED)
def test_all_layouts_train_on_the_same_data_to_the_same_losses(layout, whole, tmp_path):
    (exact, rounded), expected = parted(lines(tmp_path / "run", layout)), parted(whole)
    assert exact == expected[0]
    assert rounded == pytest.approx(expected[1], rel=1e-5)


def test_a_slightly_higher_learning_rate_gives_other_losses(whole, tmp_path):
    """The negative control."""
    _, rounded = parted(lines(tmp_path / "run", "whole", learning_rate=0.0101))
    assert rounded != pytest.approx(parted(whole)[1], rel=1e-5)


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_in_bf16_too(layout, tmp_path):
    runs = [
        parted(lines(tmp_path / one, one, bf16=True, micro_batch_size=4))
        for one in ("whole", layout)
    ]
    assert runs[0][0] == runs[1][0]
    assert runs[1][1] == pytest.approx(runs[0][1], rel=0.02)


def test_the_lines_in_the_document_train(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "ranks.md").read_text()
    block = re.search(r"the mesh tells the rest:\n\n((?:    .*\n)+)", text).group(1)
    arguments = (textwrap.dedent(block), str(tmp_path / "run"))
    assert run_ranks(run_the_document, *arguments, world_size=4) == [0] * 4
    assert (tmp_path / "run" / "checkpoint-2").exists()


def test_a_rank_that_is_gone_is_named_long_before_time_is_up(tmp_path):
    run_ranks(train_until_a_rank_is_gone, str(tmp_path), world_size=2, never_end=[1])
    assert "rank 1" in (tmp_path / "error").read_text()


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    assert run_ranks(refused, str(folder)) == [0, 0]
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_go_wrong_silently_is_refused_by_name(name, errors):
    assert REFUSED[name][2] in errors[name]
