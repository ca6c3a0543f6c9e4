"""Saves that go on beside the training: exactly the bytes of their step, or no checkpoint."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from small_trainers import bits, small_trainer, steps_in
from unbroken.capture import capture, encode
from unbroken.checkpoint import Checkpointer, SavePolicy
from unbroken.checkpoint.save import staging
from unbroken.errors import SaveError
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, KeepPolicy
from unbroken.testing import POWER_CUT_MODES, FaultyStorage, PowerCut
from unbroken.training import Callback

BESIDE = ["async", "overlap"]
MODES = ["blocking", *BESIDE]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


class Training:
    """A small training of a model with statistics in its layers and an average of its weights."""

    def __init__(self, where, mode, device="cpu", **more) -> None:
        torch.manual_seed(3)
        self.device = device
        layers = (nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 4))
        self.model = nn.Sequential(*layers).to(device)
        self.ema = AveragedModel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.objects = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        self.checkpointer = Checkpointer(where, save=SavePolicy(mode=mode), **self.objects, **more)
        self.checkpointer.resume()
        self.step = 0

    def forward(self) -> None:
        draw = torch.Generator().manual_seed(self.step)
        inputs = torch.randn(16, 8, generator=draw).to(self.device)
        self.model(inputs).square().mean().backward()

    def train_step(self) -> None:
        self.forward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        with torch.no_grad():
            self.model[0].weight.clamp_(-0.2, 0.2)
        self.step += 1

    def save(self) -> dict[str, bytes]:
        """Save, and return the bytes that the checkpoint has to hold."""
        self.checkpointer.save(self.step)
        return self.bytes_now()

    def bytes_now(self) -> dict[str, bytes]:
        leaves = encode(capture(self.objects)).leaves
        return {leaf.path: b"".join(bytes(part) for part in leaf.chunks()) for leaf in leaves}

    def edit(self) -> None:
        with torch.no_grad():
            self.model[2].weight.mul_(2)


def stored(storage, step) -> dict[str, bytes]:
    reader, found = CheckpointReader(storage, f"checkpoint-{step}"), {}
    for path, entry in reader.manifest.tensors.items():
        buffer = bytearray(entry.nbytes)
        reader.read_leaf_into(path, memoryview(buffer))
        found[path] = bytes(buffer)
    return {path: data for path, data in found.items() if not path.startswith("rng.")}


def storage_of(training):
    return training.checkpointer.run.storage


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_holds_the_bytes_of_its_step_while_training_goes_on(mode, device, tmp_path):
    training, wanted = Training(tmp_path, mode, device), {}
    for _ in range(20):
        training.train_step()
        if training.step % 3 == 0:
            wanted[training.step] = training.save()
    training.checkpointer.wait()
    for step, data in wanted.items():
        assert stored(storage_of(training), step) == data


class Held:
    """Holds what a thread copies back until it is let go, or for a moment."""

    def __init__(self, monkeypatch, seconds=None) -> None:
        self.go, self.began, self.copies = threading.Event(), threading.Event(), 0
        real = staging.ctypes.memmove

        def copy(*where) -> None:
            if threading.current_thread() is threading.main_thread():  # what is copied at once
                return real(*where)
            self.began.set()
            self.go.wait(seconds)
            self.copies += 1
            return real(*where)

        monkeypatch.setattr(staging.ctypes, "memmove", copy)


def test_the_next_step_of_the_optimizer_waits_for_the_copy(tmp_path, monkeypatch):
    training = Training(tmp_path, "overlap")
    training.train_step()
    held, seen = Held(monkeypatch, seconds=0.01), []
    data = training.save()
    training.optimizer.register_step_post_hook(lambda *_: (seen.append(held.copies), held.go.set()))
    training.train_step()
    assert seen == [held.copies]
    training.checkpointer.wait()
    assert stored(storage_of(training), 1) == data


def test_hearing_of_saves_does_not_wait_for_the_copy(tmp_path, monkeypatch):
    training = Training(tmp_path, "overlap")
    held = Held(monkeypatch)
    data = training.save()
    assert training.checkpointer.poll() == []
    assert not training.checkpointer.should_save(1)
    held.go.set()
    training.checkpointer.wait()
    assert stored(storage_of(training), 0) == data


def test_without_that_hook_the_copy_would_be_torn(tmp_path, monkeypatch):
    training = Training(tmp_path, "overlap")
    training.train_step()
    held = Held(monkeypatch)
    data = training.save()
    training.checkpointer._saver._hook.end()
    monkeypatch.setattr(staging.StagedState, "modified", lambda _self: ())
    monkeypatch.setattr(staging.SourceDigests, "differing", lambda *_: [])
    training.train_step()
    held.go.set()
    training.checkpointer.wait()
    assert stored(storage_of(training), 1) != data


@pytest.mark.parametrize("when", ["before the copy", "after the copy"])
def test_an_edit_is_found_and_the_next_step_is_saved_in_its_place(when, tmp_path, monkeypatch):
    training = Training(tmp_path, "overlap", save_steps=10)
    training.train_step()
    held = Held(monkeypatch)
    if when == "after the copy":
        held.go.set()
    training.save()
    training.edit()
    held.go.set()
    training.train_step()
    assert training.checkpointer.should_save(2)
    data = training.save()
    training.edit()  # from now on this tensor is copied at once
    training.checkpointer.wait()
    assert stored(storage_of(training), 2) == data
    assert [step for step, _ in training.checkpointer.run.catalog.folders()] == [2]
    told = [one for one in training.checkpointer.run.history.records() if one["event"] != "started"]
    assert [(one["event"], one["step"]) for one in told] == [("given up", 1), ("saved", 2)]


def test_an_edit_that_no_later_save_makes_good_is_an_error(tmp_path):
    training = Training(tmp_path, "overlap")
    training.train_step()
    training.save()
    training.edit()
    with pytest.raises(SaveError, match=r"checkpoint-1.*changed.*model\.2\.weight"):
        training.checkpointer.close()


def test_an_embedding_that_edits_its_weight_in_the_forward_pass_is_found(tmp_path):
    model = nn.Embedding(8, 4, max_norm=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(
        tmp_path, save=SavePolicy(mode="overlap"), model=model, optimizer=optimizer
    ) as saving:
        saving.save(1)
        model(torch.arange(8)).sum().backward()
        optimizer.step()
        assert saving.should_save(2)
        saving.save(2)


def test_memory_that_was_exchanged_is_found(tmp_path):
    training = Training(tmp_path, "overlap")
    training.save()
    training.model[0].weight.data = torch.zeros(64, 8)
    with pytest.raises(SaveError, match=r"model\.0\.weight"):
        training.checkpointer.wait()


def test_what_is_copied_at_once_may_be_edited_at_once(tmp_path):
    training = Training(tmp_path, "async")
    data = training.save()
    training.model[0].weight.data.zero_()
    training.checkpointer.wait()
    assert stored(storage_of(training), 0) == data


@pytest.mark.parametrize("mode", BESIDE)
def test_a_failure_is_raised_at_the_next_edge_and_all_before_is_as_it_was(mode):
    storage = FaultyStorage()
    training = Training(storage, mode)
    training.train_step()
    data = training.save()
    training.checkpointer.wait()
    training.train_step()
    storage.arm(fail_at=6)
    training.save()
    training.train_step()
    with pytest.raises(SaveError):
        training.checkpointer.wait()
    assert stored(storage, 1) == data
    training.save()
    training.checkpointer.wait()
    assert set(stored(storage, 3)) == set(data)


def cut_at(step, mode):
    """Save twice, with the power cut at a step of the second save; return disk and states."""
    storage = FaultyStorage()
    training = Training(storage, mode)
    training.train_step()
    states = {1: training.save()}
    training.checkpointer.wait()
    training.train_step()
    storage.arm(cut_at=step)
    try:
        states[2] = training.bytes_now()
        training.save()
        training.forward()
        training.checkpointer.wait()
    except PowerCut:
        return storage, states
    return None, states


@pytest.mark.parametrize("mode", BESIDE)
def test_a_cut_at_any_step_leaves_the_last_checkpoint_or_the_new_one(mode):
    for step in range(1, 200):
        storage, states = cut_at(step, mode)
        if storage is None:
            break
        disks = [storage.after_kill(), *(storage.after_power_cut(m) for m in POWER_CUT_MODES)]
        for disk in disks:
            newest = 2 if disk.stat("checkpoint-2") else 1
            assert stored(disk, newest) == states[newest]
    assert 10 < step < 199


def test_memory_is_used_again(tmp_path):
    training = Training(tmp_path, "async")
    places = set()
    for _ in range(3):
        training.train_step()
        training.save()
        places.add(training.checkpointer._saver._buffer._memory.data_ptr())
    assert len(places) == 1
    training.checkpointer.close()


FORGETS_TO_CLOSE = """
import sys, torch
from unbroken import Checkpointer, SavePolicy
model = torch.nn.Sequential(*(torch.nn.Linear(size, 1031) for size in (1031, 517, 2050)))
Checkpointer(sys.argv[1], save=SavePolicy(mode=sys.argv[2]), model=model).save(1)
"""


@pytest.mark.parametrize("mode", BESIDE)
def test_a_script_that_ends_without_closing_keeps_its_last_save(mode, tmp_path):
    subprocess.run([sys.executable, "-c", FORGETS_TO_CLOSE, str(tmp_path), mode], check=True)
    assert CheckpointReader(LocalStorage(tmp_path), "checkpoint-1").verify() == []


class NotesSaves(Callback):
    def __init__(self) -> None:
        self.there = []

    def on_save(self, trainer, checkpoint) -> None:
        storage = trainer.checkpointer.run.storage
        self.there.append(CheckpointReader(storage, checkpoint.rpartition("/")[2]).step)


@pytest.mark.parametrize("mode", MODES)
def test_a_trainer_ends_with_the_same_bits_and_tells_of_each_durable_checkpoint(mode, tmp_path):
    notes = NotesSaves()
    trainer = small_trainer(tmp_path, save_mode=mode, trainer={"callbacks": [notes]})
    trainer.train()
    assert notes.there == steps_in(tmp_path) == [0, 2, 4, 6]
    plain = small_trainer(tmp_path / "other")
    plain.train()
    assert bits(trainer.model) == bits(plain.model)


@pytest.mark.parametrize("mode", BESIDE)
def test_a_trainer_goes_on_from_a_checkpoint_made_beside_it(mode, tmp_path):
    whole = small_trainer(tmp_path / "whole", lr_scheduler_type="constant")
    whole.train()
    for steps in (3, 6):
        settings = {"save_mode": mode, "max_steps": steps, "save_steps": 1}
        trainer = small_trainer(tmp_path / "cut", lr_scheduler_type="constant", **settings)
        trainer.train()
    assert trainer.resume_report.step == 3
    assert bits(trainer.model) == bits(whole.model)


def second_save(mode, fail_at=None):
    """Save twice and keep one, with a failure of the disk at a step of the second save."""
    storage = FaultyStorage()
    training = Training(storage, mode, keep=KeepPolicy(last=1))
    training.train_step()
    training.save()
    training.checkpointer.wait()
    training.train_step()
    storage.arm(fail_at=fail_at)
    try:
        data, error = training.save(), None
        training.checkpointer.wait()
    except SaveError as one:
        data, error = training.bytes_now(), str(one)
    return storage, data, error


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_to_remove_what_is_not_kept_is_a_save_error_and_the_new_one_stands(mode):
    storage, data, error = second_save(mode)
    assert (error, stored(storage, 2)) == (None, data)
    told = []
    for before_the_end in range(8):
        failed, data, error = second_save(mode, storage.steps - before_the_end)
        assert stored(failed, 2) == data
        told += [error] if error else []  # a step record that is lost is no error
    assert len(told) >= 6
    assert all("checkpoint-2: is whole and durable" in error for error in told)
