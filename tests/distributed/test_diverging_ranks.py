"""What a checkpoint stores once is the same on all ranks, or the save says which rank differs."""

from __future__ import annotations

import json
import signal

import pytest

from distributed.diverging_ranks import CASES, CUT, STEPS, save_all, train_experts
from distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    assert run_ranks(save_all, str(folder), world_size=2) == [0, 0]
    return [json.loads((folder / f"told-{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_a_save_names_what_differs_between_ranks_and_is_stored_once(name, told):
    for of_rank in told:
        for says in CASES[name].says:
            assert says in of_rank[name]
        assert CASES[name].says or of_rank[name] == ""
        assert not CASES[name].of_a_trainer or "Checkpointer" not in of_rank[name]


def test_experts_that_are_stored_for_each_rank_go_on_exactly(tmp_path):
    ends = {}
    for name, parts in {"whole": [STEPS], "cut": [CUT, STEPS]}.items():
        (tmp_path / name).mkdir()
        for last in parts:
            codes = run_ranks(train_experts, str(tmp_path / name), last, world_size=2)
            assert codes == [-signal.SIGKILL] * 2
        ends[name] = [json.loads((tmp_path / name / f"weights-{r}").read_text()) for r in (0, 1)]
    assert [weights for weights, _ in ends["cut"]] == [weights for weights, _ in ends["whole"]]
    assert ends["whole"][0][0] != ends["whole"][1][0]
    assert "exact" in ends["cut"][1][1][0]
