"""A step that does not fit: an error that names the portion to lower, or smaller portions."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

from scenarios import metrics
from small_trainers import PAIRS, bits, small_trainer
from unbroken.errors import ConfigError, DeviceMemoryError


class Small(nn.Module):
    """A model on a device that holds only so many samples."""

    def __init__(self, room: int, *, statistics: bool = False) -> None:
        os.environ["ROOM_FOR_SAMPLES"] = str(room)  # of the machine, not of the model
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(6, 4)
        self.normal = nn.BatchNorm1d(6) if statistics else nn.Identity()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        if len(x) > int(os.environ["ROOM_FOR_SAMPLES"]):
            raise torch.OutOfMemoryError("there is no more room")
        return self.layer(self.normal(x))


def trainer_with(folder, room: int, size, **settings):
    parts = {"model": Small(room), "micro_batch_size": size, "log_data_digest": True}
    return small_trainer(folder, **{**parts, **settings})


def test_the_error_names_the_portion_to_lower(tmp_path):
    with pytest.raises(DeviceMemoryError, match="micro_batch_size 8") as caught:
        trainer_with(tmp_path, 4, 8).train()
    assert 'micro_batch_size=4 or "auto"' in caught.value.hint


def test_auto_halves_the_portion_until_it_fits_and_trains_as_if_it_had_been_that(tmp_path):
    auto = trainer_with(tmp_path / "auto", 2, "auto")
    auto.train()
    given = trainer_with(tmp_path / "given", 2, 2)
    given.train()
    assert auto.config.micro_batch_size == 2
    assert bits(auto.model) == bits(given.model)
    assert metrics(tmp_path / "auto") == metrics(tmp_path / "given")


def test_halving_is_told_in_report_and_history_as_equivalent(tmp_path):
    auto = trainer_with(tmp_path, 4, "auto")
    auto.train()
    told = [d for d in auto.resume_report.differences if d.path == "micro_batch_size"]
    assert [(d.stored, d.now, d.verdict) for d in told] == [(8, 4, "equivalent")]
    events = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    halved = [event for event in events if event["event"] == "micro_batch_size"]
    assert [(event["from"], event["to"], event["verdict"]) for event in halved] == [
        (8, 4, "equivalent")
    ]


def test_a_resume_goes_on_with_the_portion_that_fitted(tmp_path):
    trainer_with(tmp_path / "a", 2, "auto", max_steps=3, lr_scheduler_type="constant").train()
    again = trainer_with(tmp_path / "a", 2, "auto", lr_scheduler_type="constant")
    report = again.train().resume_report
    whole = trainer_with(tmp_path / "b", 2, 2, lr_scheduler_type="constant")
    whole.train()
    assert bits(again.model) == bits(whole.model)
    assert report.verdict == "exact"


def test_a_smaller_device_halves_in_the_middle_of_a_run(tmp_path):
    trainer_with(tmp_path, 8, "auto", max_steps=3).train()
    smaller = trainer_with(tmp_path, 4, "auto")
    assert smaller.train().progress.step == 6
    assert smaller.config.micro_batch_size == 4


def test_a_portion_of_one_sample_cannot_be_halved(tmp_path):
    with pytest.raises(DeviceMemoryError, match="micro_batch_size 1"):
        trainer_with(tmp_path, 0, "auto").train()


def test_batch_statistics_would_be_those_of_other_portions_so_nothing_is_halved(tmp_path):
    with pytest.raises(DeviceMemoryError):
        trainer_with(tmp_path, 4, "auto", model=Small(4, statistics=True)).train()


def test_required_exactness_halves_nothing(tmp_path):
    with pytest.raises(DeviceMemoryError):
        trainer_with(tmp_path, 4, "auto", exact_resume="require").train()


def test_a_loader_makes_its_batches_itself(tmp_path):
    loader = torch.utils.data.DataLoader(PAIRS, batch_size=8)
    with pytest.raises(ConfigError, match="needs a map-style data set"):
        trainer_with(tmp_path, 8, "auto", dataset=loader)
