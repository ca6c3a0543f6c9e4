"""Whatever the model is like, lanes give the same bits on two ranks as on one."""

from __future__ import annotations

import pytest

from distributed.models import MODELS, outcomes, train_all_models, train_with_a_buffer
from distributed.ranks import run_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")]
    for world_size, folder in enumerate(folders, 1):
        codes = run_ranks(train_all_models, str(folder), world_size=world_size)
        assert codes == [0] * world_size
    return [outcomes(folder) for folder in folders]


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_give_the_bits_of_one(name, trained):
    one, two = trained
    assert two[name] == one[name]


def test_a_parameter_that_no_rank_uses_has_no_gradient_and_so_no_optimizer_state(trained):
    paths = [path for path in trained[1]["sometimes unused"] if "never" in path]
    assert paths == ["model.never"]


def test_a_buffer_that_differs_between_ranks_is_named_by_the_next_save(tmp_path):
    run_ranks(train_with_a_buffer, str(tmp_path))
    assert (tmp_path / "count" / "checkpoint-2").exists()
    assert (tmp_path / "data" / "checkpoint-0").exists()
    for rank in (0, 1):
        assert "rank 1: model.count" in (tmp_path / f"error-{rank}").read_text()
