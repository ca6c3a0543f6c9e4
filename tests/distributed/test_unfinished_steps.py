"""Gradients of an unfinished window are saved on ranks: each rank's own, or its part of them."""

from __future__ import annotations

import json

import pytest

from distributed.ranks import run_ranks
from distributed.unfinished_steps import STEPS, train


def ended(folder, kind: str, *stops: int, restores: bool = True) -> dict:
    folder.mkdir()
    for until in stops:
        assert run_ranks(train, str(folder), kind, until, restores) == [0, 0]
    return json.loads((folder / "found-0.json").read_text())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_window_that_is_cut_in_its_middle_is_exact_on_ranks(kind, tmp_path):
    whole = ended(tmp_path / "whole", kind, STEPS)
    assert ended(tmp_path / "cut", kind, 4, STEPS) == whole
    if kind == "ddp":
        assert ended(tmp_path / "left out", kind, 4, STEPS, restores=False) != whole
