"""Models whose tensors come, or change their shapes, in training are resumed as they had grown."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn
from torch.ao.quantization import HistogramObserver, PerChannelMinMaxObserver
from torch.nn.utils import prune

from fresh import run_fresh
from small_trainers import small_trainer
from unbroken import Checkpointer
from unbroken.errors import StateMismatchError
from unbroken.storage import storage_at
from unbroken.store import CheckpointReader

STEPS, GROWS_AT, BEFORE, AFTER = 6, 3, 2, 5


class Bank(nn.Module):
    """Keeps what it has seen in buffers that grow: one saved by its model's file, one not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("bank", torch.zeros(0, 4))
        self.register_buffer("sums", torch.zeros(1), persistent=False)

    def forward(self, x):
        y = self.layer(x) + (self.bank.mean(0) if len(self.bank) else 0) + self.sums.mean()
        self.bank = torch.cat([self.bank, y.detach()[:1]])
        self.sums = torch.cat([self.sums, y.detach().sum()[None]])
        return y


class Scales(nn.Module):
    """Comes by a buffer in its first forward, and by parameters when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4))])

    def forward(self, x):
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.rand(4))
        for scale in self.scales:
            x = x * scale
        return self.layer(x) * self.mask


class Blocks(nn.Module):
    """Gets more layers, and says how it comes to those of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def prepare_to_load(self, stored):
        while f"blocks.{len(self.blocks)}.weight" in stored:
            self.blocks.append(nn.Linear(4, 4))


class OwnWay(nn.Module):
    """Takes a state of any length by a `load_state_dict` of its own, as it would without us."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.rows = nn.ParameterDict()

    def forward(self, x):
        for row in self.rows.values():
            x = x + row
        return self.layer(x)

    def load_state_dict(self, state, strict=True, assign=False):
        for name in state:
            if name.startswith("rows."):
                self.rows[name.removeprefix("rows.")] = nn.Parameter(torch.empty(4))
        return super().load_state_dict(state, strict, assign)


class Pruned(nn.Module):
    """Has weights left out from some step on, and says how it comes to their mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)

    def prepare_to_load(self, stored):
        if "layer.weight_orig" in stored:
            prune.identity(self.layer, "weight")


def observed() -> nn.Module:
    per_channel = PerChannelMinMaxObserver(ch_axis=1)
    return nn.Sequential(nn.Linear(4, 4), HistogramObserver(), nn.Linear(4, 4), per_channel)


def add_scale(model, optimizer) -> None:
    model.scales.append(nn.Parameter(torch.rand(4)))
    optimizer.param_groups[0]["params"].append(model.scales[-1])


def add_block(model, optimizer) -> None:
    model.blocks.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": model.blocks[-1].parameters(), "lr": 0.03})


def add_row(model, optimizer) -> None:
    model.rows["first"] = nn.Parameter(torch.rand(4))
    optimizer.add_param_group({"params": [model.rows["first"]]})


def leave_out(model, _optimizer) -> None:
    prune.l1_unstructured(model.layer, "weight", amount=0.5)


def unfreeze(model, optimizer) -> None:
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.03})


def freeze(_model, optimizer) -> None:
    del optimizer.param_groups[0]["params"][:2]


def nothing(*_) -> None:
    pass


MODELS = {
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()), nothing),
    "a lazy one alone": (lambda: nn.LazyLinear(4), nothing),
    "buffers that grow": (Bank, nothing),
    "observers": (observed, nothing),
    "parameters of a list": (Scales, add_scale),
    "more layers": (Blocks, add_block),
    "a way of its own": (OwnWay, add_row),
    "weights that are left out": (Pruned, leave_out),
    "unfrozen later": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), unfreeze),
    "frozen later": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), freeze),
}


def train(kind: str, folder: str, kill_at: int | None) -> None:
    make, change = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    trained = model[1] if kind == "unfrozen later" else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
    with Checkpointer(folder, model=model, optimizer=optimizer) as checkpointer:
        report = checkpointer.resume()
        assert report.verdict == "exact" or not report.resumed
        if not report.resumed:
            checkpointer.save(0)
        for step in range(report.step, STEPS):
            torch.manual_seed(step)
            if step == GROWS_AT:
                change(model, optimizer)
            (model(torch.randn(8, 4)) - 1).square().mean().backward()
            optimizer.step()
            model.zero_grad()  # also of what is not trained yet
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            checkpointer.save(step + 1)


def left_by(folder, step: int = STEPS) -> dict:
    reader = CheckpointReader(storage_at(folder), f"checkpoint-{step}")
    tensors = {path: region.digest for path, region in reader.manifest.tensors.items()}
    return {path: digest for path, digest in tensors.items() if not path.startswith("rng.")}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_changes_in_training_is_resumed_as_it_was_changed(kind, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_fresh(train, kind, str(whole), None) == 0
    for kill_at in (0, BEFORE, AFTER):
        assert run_fresh(train, kind, str(killed), kill_at) == -signal.SIGKILL
    assert run_fresh(train, kind, str(killed), None) == 0
    assert left_by(killed) == left_by(whole)
    assert left_by(whole, 1) != left_by(whole)


def saved(folder, make) -> None:
    with Checkpointer(folder, model=make()) as checkpointer:
        checkpointer.resume()
        checkpointer.save(1)


class Queue(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("queue", torch.ones(length))


def test_a_shape_that_the_script_has_changed_is_no_growth(tmp_path):
    saved(tmp_path, lambda: Queue(3))
    other = Queue(5)
    refusal = pytest.raises(StateMismatchError, match=r"model.queue.*float32\[3\].*float32\[5\]")
    with Checkpointer(tmp_path, model=other) as checkpointer, refusal:
        checkpointer.resume()
    assert torch.equal(other.queue, torch.ones(5))


class Grown(nn.Module):
    """Has grown by a layer of which nobody can tell how it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.register_buffer("queue", torch.zeros(0))


def test_what_nobody_can_build_is_named_with_the_hook_that_could_and_nothing_is_changed(tmp_path):
    model = Grown()
    with Checkpointer(tmp_path, model=model) as checkpointer:
        checkpointer.resume()
        model.layers.append(nn.Linear(2, 2))
        model.queue = torch.ones(3)
        checkpointer.save(1)
    fresh = Grown()
    weight = fresh.layers[0].weight.clone()
    refusal = pytest.raises(StateMismatchError, match=r"layers\.1\.weight")
    with Checkpointer(tmp_path, model=fresh) as checkpointer, refusal as refused:
        checkpointer.resume()
    assert "prepare_to_load(self, stored)" in refused.value.hint
    assert (len(fresh.queue), len(fresh.layers)) == (0, 1)
    assert torch.equal(fresh.layers[0].weight, weight)
    fresh.prepare_to_load = lambda stored: fresh.layers.append(nn.Linear(2, 2))
    with Checkpointer(tmp_path, model=fresh) as checkpointer:
        assert checkpointer.resume().verdict == "exact"
    assert torch.equal(fresh.layers[1].weight, model.layers[1].weight)


def test_a_buffer_can_grow_in_place_after_a_save_and_after_a_resume(tmp_path):
    for _ in range(2):
        model = Queue(3)
        with Checkpointer(tmp_path, model=model) as checkpointer:
            checkpointer.resume()
            checkpointer.save(1)
        model.queue.resize_(9)


class Recalls(Bank):
    """Grows in training alone."""

    def forward(self, x):
        return super().forward(x) if self.training else self.layer(x)


class Shrinks(Blocks):
    def prepare_to_load(self, stored):
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for name in stored if name.endswith(".weight"))


@pytest.mark.parametrize("make", [Bank, Shrinks])
def test_weights_from_before_the_model_grew_are_loaded_alone(make, tmp_path):
    model = make()
    with Checkpointer(tmp_path, model=model, tell=None) as checkpointer:
        checkpointer.resume()
        model(torch.ones(2, 4))
        checkpointer.save(1)
        before = contents(model)
        model(torch.ones(2, 4))
        if make is Shrinks:
            model.blocks.append(nn.Linear(4, 4))
        assert contents(model).keys() != before.keys() or contents(model) != before
        checkpointer.load(1, ["model"])
        assert contents(model) == before


def contents(model) -> dict:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def test_weights_that_nobody_can_make_room_for_are_named_with_the_hook(tmp_path):
    model = Grown()
    with Checkpointer(tmp_path, model=model, tell=None) as checkpointer:
        checkpointer.resume()
        checkpointer.save(1)
        model.layers.append(nn.Linear(2, 2))
        grown = contents(model)
        with pytest.raises(StateMismatchError, match=r"layers\.1") as refused:
            checkpointer.load(1, ["model"])
        assert "prepare_to_load(self, stored)" in refused.value.hint
        assert contents(model) == grown


def test_the_best_weights_are_loaded_into_a_model_that_has_grown_since(tmp_path):
    model, pairs = Recalls(), [(torch.full((4,), float(i)), torch.tensor(i % 4)) for i in range(8)]
    settings = {"eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1e3}
    parts = {"eval_dataset": pairs}
    trainer = small_trainer(
        tmp_path, model=model, dataset=pairs, max_steps=4, trainer=parts, **settings
    )
    trainer.train()
    assert len(model.bank) == trainer.statistics.best_step < 4
