"""On several ranks steps run twice have the same bits, and all ranks raise what one has found."""

from __future__ import annotations

import pytest

from distributed.ranks import run_ranks
from unbroken.errors import StepVerificationError
from verification.on_ranks import LAST, train


@pytest.mark.parametrize("layout", LAST)
def test_the_bits_are_those_of_a_run_without(layout, tmp_path):
    found = []
    for every in (None, 1, 2):
        folder = tmp_path / str(every)
        folder.mkdir()
        assert run_ranks(train, str(folder), layout, every) == [0, 0]
        found.append((folder / "bits-0").read_bytes())
        assert found[-1] == (folder / "bits-1").read_bytes()
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("layout", LAST)
def test_all_ranks_raise_what_one_of_them_finds_in_a_pass(layout, tmp_path):
    code = StepVerificationError.exit_code
    assert run_ranks(train, str(tmp_path), layout, 1, "pass") == [code, code]
    errors = {(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)}
    step = 1 if layout == "tp" else 2  # there both ranks take all micro-batches
    assert errors == {f"{step} 1 {LAST[layout]} (Linear)"}


def test_all_ranks_raise_what_one_of_them_finds_at_rest(tmp_path):
    code = StepVerificationError.exit_code
    assert run_ranks(train, str(tmp_path), "whole", 1, "rest") == [code, code]
    assert {(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)} == {"2 1 0.weight"}
