"""A resume that is refused has changed nothing: no object, no generator, no file, on no rank."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from small_trainers import PAIRS, bits, small_model, small_trainer, steps_in
from unbroken import Checkpointer
from unbroken.changes.compare import ResumePolicy
from unbroken.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DataError,
    DifferenceError,
    StateMismatchError,
    UnbrokenError,
)


@pytest.fixture
def run(tmp_path):
    """A finished run with checkpoints 0, 2, 4 and 6."""
    folder = tmp_path / "run"
    small_trainer(folder).train()
    return folder


def names_in(folder):
    """All that a start may change: what is there under which name, and how long it is."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in folder.rglob("*")
        if path.name != "run.lock" and path.is_file()
    }


def users_generators():
    numpy = np.random.get_state()[1].tobytes()
    return random.getstate(), numpy, torch.get_rng_state().numpy().tobytes()


class OneDevice:
    """A generator of a device that this machine lacks."""

    def get_state(self):
        return torch.zeros(16, dtype=torch.uint8)


@pytest.fixture
def saved_on_a_gpu(tmp_path, monkeypatch):
    """Two checkpoints with the random state of a CUDA device, saved where there was one."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "default_generators", (OneDevice(),))
        model = nn.Linear(2, 1)
        with Checkpointer(tmp_path / "gpu", model=model) as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, {"note": step})
    return tmp_path / "gpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
@pytest.mark.parametrize("which", ["auto", 1])
def test_random_states_of_a_device_that_is_not_here_are_refused_before_a_change(
    saved_on_a_gpu, which
):
    model = nn.Linear(2, 1)
    before = bits(model), users_generators(), names_in(saved_on_a_gpu)
    checkpointer = Checkpointer(saved_on_a_gpu, model=model)
    with checkpointer, pytest.raises(DifferenceError, match=r"rng\.cuda: stored 1, now 0"):
        checkpointer.resume(which)
    assert (bits(model), users_generators(), names_in(saved_on_a_gpu)) == before
    allowed = Checkpointer(saved_on_a_gpu, model=model, resume=ResumePolicy(allow=["rng.cuda"]))
    with allowed:
        report = allowed.resume(which)
    assert (report.resumed, report.verdict) == (True, "changed")


class Picky:
    """An object that says of a state whether it will take it, before it does."""

    def __init__(self, kind):
        self.kind = kind

    def state_dict(self):
        return {"kind": self.kind}

    def check_state_dict(self, state):
        if state != self.state_dict():
            raise DataError("picky", expected=self.kind, found=state["kind"])

    def load_state_dict(self, state):
        self.check_state_dict(state)


def test_what_an_object_says_of_a_state_is_heard_before_a_change(tmp_path):
    with Checkpointer(tmp_path, model=nn.Linear(2, 1), picky=Picky("a")) as checkpointer:
        checkpointer.save(1)
    model = nn.Linear(2, 1)
    before = bits(model), names_in(tmp_path)
    again = Checkpointer(tmp_path, model=model, picky=Picky("b"))
    with again, pytest.raises(DataError, match="picky"):
        again.resume()
    assert (bits(model), names_in(tmp_path)) == before


def test_data_of_another_length_are_refused_before_a_change(run):
    model = small_model()
    before = bits(model), names_in(run)
    with pytest.raises(UnbrokenError):
        small_trainer(run, model=model, dataset=PAIRS[:20]).train(2)
    after = names_in(run)
    assert bits(model) == before[0]
    assert {n: size for n, size in after.items() if n != "history.jsonl"} == {
        n: size for n, size in before[1].items() if n != "history.jsonl"
    }


@pytest.mark.parametrize("which", [2, "never", "auto"])
def test_a_damaged_line_of_the_history_stops_no_start(run, which):
    history = run / "history.jsonl"
    history.write_text("{damaged\n" + history.read_text())
    assert small_trainer(run).train(which).progress.step == 6


def test_a_journal_that_cannot_be_written_is_told_before_a_change(run):
    (run / "history.jsonl").unlink()
    (run / "history.jsonl").mkdir()
    model = small_model()
    before = bits(model), names_in(run)
    with pytest.raises(OSError, match=r"history\.jsonl"):
        small_trainer(run, model=model).train(2)
    assert (bits(model), names_in(run)) == before


def test_a_branch_that_would_be_refused_is_not_made(run):
    branch = {"branch": "lower", "learning_rate": 0.001}
    for step in (2, 4):  # had the first attempt made it, the second would be of another step
        with pytest.raises(DifferenceError, match="learning_rate"):
            small_trainer(run, **branch).train(step)
        assert not (run / "branches").exists()
    report = small_trainer(run, allow=["learning_rate"], **branch).train(4).resume_report
    assert report.step == 4


def damage_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def half_loaded(tmp_path):
    """A checkpointer whose objects a damaged checkpoint has filled in part."""
    model, late = nn.Linear(2, 1), nn.Linear(2, 1)
    with Checkpointer(tmp_path / "run", model=model, late=late) as checkpointer:
        checkpointer.save(1)
    damage_last_byte(tmp_path / "run" / "checkpoint-1" / "late.safetensors")
    checkpointer = Checkpointer(tmp_path / "run", model=nn.Linear(2, 1), late=nn.Linear(2, 1))
    with pytest.raises(CheckpointNotFoundError, match="not one checkpoint is intact"):
        checkpointer.resume()
    yield checkpointer
    checkpointer.close()


def test_parts_of_a_damaged_checkpoint_begin_no_run(half_loaded):
    with pytest.raises(StateMismatchError, match="parts of a checkpoint"):
        half_loaded.resume("never")
    with pytest.raises(StateMismatchError, match="parts of a checkpoint"):
        half_loaded.save(2)


def test_a_whole_checkpoint_loaded_over_the_parts_makes_them_whole(half_loaded, tmp_path):
    damage_last_byte(tmp_path / "run" / "checkpoint-1" / "late.safetensors")  # as it was
    assert half_loaded.resume().step == 1
    half_loaded.save(2)
    assert steps_in(tmp_path / "run") == [1, 2]


def test_a_state_of_random_generators_that_is_none_is_damage(tmp_path):
    from unbroken.capture import capture_rng, check_rng

    state = capture_rng()
    for broken in (
        {**state, "torch": torch.zeros(3, dtype=torch.uint8)},
        {},
        {**state, "numpy": 1},
    ):
        with pytest.raises(CorruptCheckpointError, match="rng"):
            check_rng(broken)
    check_rng(state)
