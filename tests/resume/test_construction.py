"""A model that a function makes: without first weights where a checkpoint brings all of them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from small_trainers import bits, small_trainer
from unbroken.errors import CheckpointError


class Tied(nn.Module):
    """Ties two layers, has both kinds of buffers, and drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(6, 6), nn.Dropout(0.2)
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.again.weight = self.inner.weight
        self.register_buffer("scale", torch.full((6,), 2.0))
        self.register_buffer("shift", torch.arange(6.0), persistent=False)

    def forward(self, x):
        return self.head(self.again(self.drop(self.inner(x * self.scale + self.shift))))


class WithPlainTensor(Tied):
    """Holds a tensor that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = [torch.ones(6)]

    def forward(self, x):
        return super().forward(x + self.offsets[0])


class LooksAtItsWeights(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.largest = self.inner.weight.max().item()


class Maker:
    """Makes a model, and remembers on which devices."""

    def __init__(self, kind) -> None:
        self.kind, self.devices = kind, []

    def __call__(self) -> nn.Module:
        self.collects = gc.isenabled()
        torch.manual_seed(5)
        self.devices.append(torch.empty(0).device.type)
        return self.kind()


def run(folder, model, max_steps=6, resume=None, **settings):
    """Train; return the bits at the end."""
    trainer = small_trainer(folder, model=model, max_steps=max_steps, **settings)
    trainer.train(resume)
    return bits(trainer.model)


@pytest.mark.parametrize("kind", [Tied, WithPlainTensor, LooksAtItsWeights])
def test_a_run_that_goes_on_is_the_same_run(tmp_path, kind):
    whole = run(tmp_path, Maker(kind)())
    assert run(tmp_path, Maker(kind), resume=2) == whole


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        (Tied, ["meta"]),
        (WithPlainTensor, ["meta", "cpu"]),
        (LooksAtItsWeights, ["meta", "cpu"]),
    ],
)
def test_first_weights_are_drawn_only_where_no_checkpoint_brings_them(tmp_path, kind, devices):
    first, again = Maker(kind), Maker(kind)
    run(tmp_path, first)
    run(tmp_path, again)
    assert (first.devices, again.devices) == (["cpu"], devices)


@pytest.mark.parametrize("kind", [Tied, LooksAtItsWeights])
def test_garbage_is_not_looked_for_only_while_there_are_no_weights(tmp_path, kind):
    run(tmp_path, make := Maker(kind))
    assert make.collects
    run(tmp_path, make)
    assert make.collects is (kind is LooksAtItsWeights)
    assert gc.isenabled()


def test_what_is_tied_stays_tied(tmp_path):
    run(tmp_path, Maker(Tied))
    trainer = small_trainer(tmp_path, model=Maker(Tied))
    assert trainer.model.again.weight is trainer.model.inner.weight
    assert not trainer.model.inner.weight.is_meta


def test_a_run_that_begins_anew_after_all_has_its_first_weights(tmp_path):
    whole = run(tmp_path / "whole", Maker(Tied)())
    run(tmp_path / "run", Maker(Tied), max_steps=2)
    assert run(tmp_path / "run", Maker(Tied), resume="never") == whole


def test_after_a_resume_that_failed_the_model_has_its_first_weights(tmp_path):
    run(tmp_path, Maker(Tied))
    for file in tmp_path.glob("checkpoint-*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    trainer = small_trainer(tmp_path, model=Maker(Tied))
    with pytest.raises(CheckpointError):
        trainer.load_checkpoint()
    assert bits(trainer.model) == bits(Maker(Tied)())


def test_what_is_not_to_be_loaded_is_drawn(tmp_path):
    run(tmp_path, Maker(Tied), max_steps=2)
    trainer = small_trainer(tmp_path, model=Maker(Tied), skip=("head.*",))
    trainer.load_checkpoint()
    assert bits(trainer.model)["head.weight"] == bits(Maker(Tied)())["head.weight"]


def test_a_function_draws_from_the_generators_as_a_model_does(tmp_path):
    torch.manual_seed(7)
    expected = bits(nn.Linear(3, 3))
    torch.manual_seed(7)
    trainer = small_trainer(tmp_path, model=lambda: nn.Linear(3, 3))
    assert bits(trainer.model) == expected


def test_without_what_the_checkpoint_brings_the_weights_would_be_others(tmp_path):
    whole = run(tmp_path, Maker(Tied)())
    trainer = small_trainer(tmp_path, model=Maker(Tied))
    trainer.load_checkpoint(2)
    with torch.no_grad():
        trainer.model.shift.zero_()  # a buffer that `state_dict` leaves out
    trainer.train()
    assert bits(trainer.model) != whole
