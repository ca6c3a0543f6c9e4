"""What a training depends on is seen wherever it is kept: each claim was silent once."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (as everybody calls it)
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from unbroken.fingerprint import (
    callable_facts,
    data_facts,
    facts_of,
    model_facts,
    object_facts,
    optimizer_facts,
    record_digest,
)


def in_closure(value):
    return lambda x: value


def uses(scale):
    @dataclasses.dataclass
    class Settings:
        scale: float

    return Settings(scale)


def noisy(k):
    def decorate(function):
        @functools.wraps(function)
        def wrapped(x):
            return function(x) * k

        return wrapped

    return decorate


def decorated(k):
    @noisy(k)
    def loss(x):
        return x

    return loss


class Weighted(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(label_smoothing=weight)

    def forward(self, x, y):
        return self.inner(x, y)


def scale_of(space):
    return lambda x: x * space.scale


LOSSES = {
    "a weight tensor": lambda v: nn.CrossEntropyLoss(weight=torch.tensor([1.0, v])),
    "a loss in a loss": Weighted,
    "a tensor in a closure": lambda v: in_closure(torch.tensor([v])),
    "a function in a closure": lambda v: in_closure([torch.relu, torch.tanh][int(v)]),
    "a lambda in a closure": lambda v: in_closure(in_closure(v)),
    "a namespace in a closure": lambda v: scale_of(argparse.Namespace(scale=v)),
    "a dataclass in a closure": lambda v: scale_of(uses(v)),
    "a tensor in a partial": lambda v: functools.partial(F.cross_entropy, weight=torch.tensor([v])),
    "a decorator": decorated,
    "a method's object": lambda v: Weighted(v).forward,
}


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_of_a_loss_counts(make):
    assert callable_facts(make(0.0)) == callable_facts(make(0.0))
    assert callable_facts(make(0.0)) != callable_facts(make(1.0))


CRITERION = nn.CrossEntropyLoss()
ARGS = argparse.Namespace(temp=1.0, resume=False)
CFG = {"temp": 1.0, "steps": 3}


def by_globals(x, y):
    return CRITERION(x / ARGS.temp, y) / CFG["temp"]


@pytest.mark.parametrize(
    ("owner", "name", "seen"),
    [
        (CRITERION, "label_smoothing", True),
        (ARGS, "temp", True),
        (ARGS, "resume", False),
        (CFG, "temp", True),
        (CFG, "steps", False),
    ],
)
def test_of_objects_among_the_globals_what_the_code_uses_counts(owner, name, seen, monkeypatch):
    before = callable_facts(by_globals)
    change = monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr
    change(owner, name, 0.5)
    assert (callable_facts(by_globals) != before) is seen


class Holder(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held, self.layer = held, nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) * self.held.scale


def hooked(value):
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda module, given, out: out * value)
    return model


def encoder(**options):
    return nn.Sequential(nn.TransformerEncoderLayer(8, **{"nhead": 2, **options}))


def configured(value):
    inner = Holder(None)
    inner.config = uses(value)
    return nn.Sequential(inner)


MODELS = {
    "the heads of attention": lambda v: nn.Sequential(nn.MultiheadAttention(4, 1 + int(v))),
    "the dropout of attention": lambda v: nn.MultiheadAttention(4, 1, dropout=v / 2),
    "norm_first": lambda v: encoder(norm_first=bool(v)),
    "an activation": lambda v: encoder(activation=[F.relu, F.gelu][int(v)]),
    "a loss in a model": lambda v: nn.Sequential(nn.CrossEntropyLoss(label_smoothing=v)),
    "the root's own print": lambda v: nn.Dropout(v / 2),
    "the nonlinearity of an RNN": lambda v: nn.RNN(2, 2, nonlinearity=["tanh", "relu"][int(v)]),
    "a config of an inner module": configured,
    "a dataclass": lambda v: Holder(uses(v)),
    "a namespace": lambda v: Holder(types.SimpleNamespace(scale=v)),
    "a partial": lambda v: Holder(functools.partial(F.leaky_relu, negative_slope=v)),
    "a lambda's closure": lambda v: Holder(in_closure(v)),
    "a tensor": lambda v: Holder(torch.tensor([v, 1.0])),
    "an array": lambda v: Holder(np.array([v, 1.0])),
    "a long list": lambda v: Holder([v] * 100),
    "a set": lambda v: Holder({"a", v}),
    "a hook": hooked,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_of_a_model_counts(make):
    assert model_facts(make(0.0)) == model_facts(make(0.0))
    assert model_facts(make(0.0)) != model_facts(make(1.0))


def test_a_buffer_is_state_and_not_compared():
    models = nn.Linear(2, 2), nn.Linear(2, 2)
    for value, model in enumerate(models):
        model.register_buffer("seen", torch.tensor([value]))
    assert model_facts(models[0]) == model_facts(models[1])


SCALE = 2.0


class Scaled(nn.Module):
    def forward(self, x):
        return x * SCALE


def test_a_global_number_in_a_model_counts(monkeypatch):
    before = model_facts(Scaled())
    monkeypatch.setattr(f"{__name__}.SCALE", 3.0, raising=False)
    monkeypatch.setitem(Scaled.forward.__globals__, "SCALE", 3.0)
    assert model_facts(Scaled()) != before


@pytest.fixture
def helper(tmp_path, monkeypatch):
    """Writes a module `helper_of_test` and a loss that calls it by its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(body: str):
        for name in ("helper_of_test", "script_of_test"):
            sys.modules.pop(name, None)
        (tmp_path / "helper_of_test.py").write_text(f"def scale(x):\n    return {body}\n")
        text = "import helper_of_test as h\ndef loss(x):\n    return h.scale(x)\n"
        (tmp_path / "script_of_test.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module("script_of_test").loss

    return make


def test_a_function_of_a_module_of_the_users_counts(helper):
    digests = [callable_facts(helper(body))["source"] for body in ("x * 2.00", "x * 3", "x * 2.0")]
    assert digests[0] == digests[2] != digests[1]


class Unfreeze:
    def __init__(self, at):
        self.at, self.where = at, f"/tmp/{at}"


def test_the_numbers_of_a_callback_count_and_its_paths_do_not():
    assert object_facts(Unfreeze(3))["values"] == {"at": 3}


class Noisy:
    def __init__(self, p, augment):
        self.p, self.augment, self.path = p, augment, f"at {p}"

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


class Flip:
    def __init__(self, p):
        self.p = p

    def __call__(self, x):
        return x


@pytest.mark.parametrize("other", [Noisy(0.2, Flip(0.5)), Noisy(0.1, Flip(0.6))])
def test_a_probability_of_a_data_set_counts_though_the_records_are_the_same(other):
    before, after = data_facts(Noisy(0.1, Flip(0.5))), data_facts(other)
    assert before["values"] != after["values"]
    assert before["records"][:1] == after["records"][:1]


def test_the_weights_of_a_sampler_count():
    facts = [
        data_facts(DataLoader([1, 2], sampler=WeightedRandomSampler(weights, 2)))["loader"]
        for weights in ([1.0, 2.0], [1.0, 2.0], [1.0, 3.0])
    ]
    assert facts[0] == facts[1] != facts[2]


@dataclasses.dataclass(slots=True)
class Slotted:
    x: float


RECORDS = {
    "slots": Slotted,
    "a sparse tensor": lambda v: torch.tensor([0.0, v, 1.0]).to_sparse(),
    "a compressed tensor": lambda v: torch.tensor([[0.0, v, 1.0]]).to_sparse_csr(),
    "a set": lambda v: {v, "a"},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("make", RECORDS.values(), ids=RECORDS)
def test_of_a_record_counts(make):
    assert record_digest(make(2.0)) == record_digest(make(2.0))
    assert record_digest(make(2.0)) != record_digest(make(3.0))


class Look(torch.optim.SGD):
    def __init__(self, parameters, k):
        super().__init__(parameters, lr=1.0)
        self.k = k


def test_a_number_of_an_optimizer_of_the_users_counts():
    assert optimizer_facts(Look([nn.Parameter(torch.ones(1))], 5))["k"] == 5


def test_a_large_tensor_counts_by_a_sample():
    one = torch.zeros(1 << 20)
    assert facts_of(one) != facts_of(one + 1)


def test_sets_are_spelled_the_same_in_each_process():
    code = (
        "from unbroken.fingerprint import facts_of, source_digest\n"
        "space = {}\n"
        'exec(\'def f(x):\\n return x in {"a", "b", "c", "d", ("e", "f")}\', space)\n'
        "print(source_digest(space['f']), facts_of({'a', 'b', 'c', 'd'}))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(said) == 1
    assert "None" not in said.pop()
