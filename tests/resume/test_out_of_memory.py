"""A step that does not fit: an error that names the portion to lower, or smaller portions."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from fresh import run_fresh
from scenarios import metrics
from small_trainers import PAIRS, bits, small_trainer
from unbroken.errors import ConfigError, OutOfMemoryError
from unbroken.training import Callback
from unbroken.training.step import is_out_of_memory


class Wide(nn.Module):
    """A model that needs 16 MB and more for each sample in a portion."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.layer(x).repeat(1, 1_000_000)
        return (wide.tanh() * wide).view(len(x), -1, 4).mean(1)


def train_in_little_memory(folder: str, room: int, settings: dict) -> None:
    """Train in a process that may take `room` more MB; write what happened to found.json."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (room << 20)
    trainer = small_trainer(Path(folder) / "run", model=Wide(), max_steps=2, **settings)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        trainer.train()
    except OutOfMemoryError as error:
        found = {"error": str(error), "hint": error.hint}
    else:
        verdict = trainer.resume_report.differences[-1].verdict
        size = trainer.config.micro_batch_size
        tensors = {name: value.hex() for name, value in bits(trainer.model).items()}
        found = {
            "size": size,
            "verdict": verdict,
            "tensors": tensors,
            "step": trainer.progress.step,
        }
    (Path(folder) / "found.json").write_text(json.dumps(found))


def in_little_memory(folder: Path, room: int, **settings) -> dict:
    folder.mkdir()
    assert run_fresh(train_in_little_memory, str(folder), room, settings) == 0
    return json.loads((folder / "found.json").read_text())


def test_the_error_of_a_real_allocator_names_the_portion_to_lower(tmp_path):
    found = in_little_memory(tmp_path / "a", 250, micro_batch_size=8)
    assert "step 1: does not fit into the memory of cpu: found micro_batch_size 8" in found["error"]
    assert "can't allocate memory" in found["error"]
    assert "micro_batch_size=4" in found["hint"]


def test_auto_halves_until_a_real_allocator_has_room(tmp_path):
    auto = in_little_memory(tmp_path / "auto", 450, micro_batch_size="auto")
    assert auto["size"] in (1, 2, 4)
    assert auto["verdict"] == "equivalent"
    given = train_with_room(tmp_path / "given", micro_batch_size=auto["size"])
    assert auto["tensors"] == given


def train_with_room(folder: Path, **settings) -> dict[str, str]:
    trainer = small_trainer(folder, model=Wide(), max_steps=2, **settings)
    trainer.train()
    return {name: value.hex() for name, value in bits(trainer.model).items()}


SAID = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.98 GB)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SAID, ids=repr)
def test_all_ways_to_say_that_memory_is_short_are_understood(error):
    assert is_out_of_memory(error)


def test_other_errors_of_a_step_stay_what_they_are(tmp_path):
    wrong = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer_with(tmp_path, 8, "auto", model=wrong).train()


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
    with pytest.raises(OutOfMemoryError, match="micro_batch_size 8") as caught:
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
    room = "model.globals.Small.environ.ROOM_FOR_SAMPLES"  # a variable that the model reads
    smaller = trainer_with(tmp_path, 4, "auto", allow=[room])
    assert smaller.train().progress.step == 6
    assert smaller.config.micro_batch_size == 4


def test_a_portion_of_one_sample_cannot_be_halved(tmp_path):
    with pytest.raises(OutOfMemoryError, match="micro_batch_size 1"):
        trainer_with(tmp_path, 0, "auto").train()


def test_batch_statistics_would_be_those_of_other_portions_so_nothing_is_halved(tmp_path):
    with pytest.raises(OutOfMemoryError):
        trainer_with(tmp_path, 4, "auto", model=Small(4, statistics=True)).train()


def test_required_exactness_halves_nothing(tmp_path):
    with pytest.raises(OutOfMemoryError):
        trainer_with(tmp_path, 4, "auto", exact_resume="require").train()


def test_a_loader_makes_its_batches_itself(tmp_path):
    loader = torch.utils.data.DataLoader(PAIRS, batch_size=8)
    with pytest.raises(ConfigError, match="needs a map-style data set"):
        trainer_with(tmp_path, 8, "auto", dataset=loader)


class Late(Small):
    """Fits at first, and no longer in the middle of its second step."""

    seen_at = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Late.seen_at += 1
        if Late.seen_at == 4 and len(x) == 4:
            raise RuntimeError("CUDA error: out of memory")
        return super().forward(x)


class Counting(Callback):
    """Counts the samples of the portions that it was told of."""

    def __init__(self) -> None:
        self.samples = 0

    def on_micro_batch_end(self, trainer) -> None:
        self.samples += trainer.config.per_forward

    def state_dict(self):
        return {"samples": self.samples}

    def load_state_dict(self, state) -> None:
        self.samples = state["samples"]


def test_what_a_step_had_done_before_it_failed_is_undone(tmp_path):
    """Gradients, buffers, counters, callbacks' state and the digest of the data."""
    Late.seen_at, counting = 0, Counting()
    settings = {"log_data_digest": True, "trainer": {"callbacks": [counting]}}
    trainer = small_trainer(tmp_path, model=Late(8), micro_batch_size="auto", **settings)
    trainer._run_state.use_micro_batch(4, trainer.source)
    trainer.train()
    assert trainer.config.micro_batch_size == 2
    assert counting.samples == trainer.progress.samples == trainer.model.seen == 48


class LaterOnly(Small):
    """Does not fit where no gradient is asked for: in an evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_an_evaluation_that_does_not_fit_names_its_own_portion(tmp_path):
    settings = {"model": LaterOnly(8), "eval_steps": 2, "trainer": {"eval_dataset": PAIRS}}
    with pytest.raises(OutOfMemoryError, match=r"evaluation after step 2.*eval_batch_size 8") as e:
        small_trainer(tmp_path, **settings).train()
    assert "eval_batch_size=4" in e.value.hint
