"""A DataLoader and the configuration have one batch size, or the run does not begin."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from small_trainers import PAIRS, small_trainer
from unbroken.errors import ConfigError
from unbroken.training import TrainerConfig


def loader(size: int, **options) -> DataLoader:
    return DataLoader(PAIRS, batch_size=size, **options)


def by_batches(size: int) -> DataLoader:
    return DataLoader(PAIRS, batch_sampler=BatchSampler(SequentialSampler(PAIRS), size, False))


@pytest.mark.parametrize("make", [loader, by_batches])
@pytest.mark.parametrize("size", [4, 32])
def test_another_batch_size_than_the_loaders_is_refused_with_both_numbers(make, size, tmp_path):
    what = f"batch_size: is not that of the DataLoader: expected {size} .*found 16"
    with pytest.raises(ConfigError, match=what):
        small_trainer(tmp_path, dataset=make(size), batch_size=16)


def test_the_refusal_says_how_to_accumulate(tmp_path):
    with pytest.raises(ConfigError) as caught:
        small_trainer(tmp_path, dataset=loader(4), batch_size=16)
    assert caught.value.hint.startswith("micro_batch_size=4 accumulates its batches; or")
    trainer = small_trainer(
        tmp_path, dataset=loader(4), batch_size=16, micro_batch_size=4, max_steps=2
    )
    assert trainer.train().progress.samples == 32


def test_another_micro_batch_size_than_the_loaders_is_refused(tmp_path):
    what = "micro_batch_size: is not that of the DataLoader: expected 4 .*found 8"
    with pytest.raises(ConfigError, match=what):
        small_trainer(tmp_path, dataset=loader(4), batch_size=16, micro_batch_size=8)


def test_a_batch_size_that_is_left_open_is_the_loaders(tmp_path):
    trainer = small_trainer(tmp_path, dataset=loader(10), max_steps=3)
    assert trainer.train().progress.samples == 30
    assert trainer.config.batch_size == 10
    again = small_trainer(tmp_path, dataset=loader(10), max_steps=3)
    assert again.train().resume_report.verdict == "exact"


def test_of_data_without_a_batch_size_the_configuration_counts(tmp_path):
    one_by_one = DataLoader(torch.utils.data.TensorDataset(torch.ones(40, 6)), batch_size=None)
    assert small_trainer(tmp_path / "a", dataset=one_by_one).config.batch_size == 8
    assert small_trainer(tmp_path / "b").config.batch_size == 8
    assert TrainerConfig().to_dict()["batch_size"] == 8
