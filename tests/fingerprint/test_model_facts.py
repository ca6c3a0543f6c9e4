"""Fingerprints of models and optimizers, as they were built."""

from __future__ import annotations

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2Config, GPT2LMHeadModel

from unbroken.fingerprint import callable_facts, model_facts, optimizer_facts, scheduler_facts


class Heads(nn.Module):
    def __init__(self, n_head: int = 2, act=torch.relu, swapped: bool = False) -> None:
        super().__init__()
        self.n_head, self.act = n_head, act
        for name in ("b", "a") if swapped else ("a", "b"):
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        return self.act(self.b(self.a(x)))


def test_numbers_and_functions_in_a_module_count_and_the_order_of_its_parts_does_not():
    assert model_facts(Heads())["n_head"] == 2
    assert model_facts(Heads(act=torch.tanh)) != model_facts(Heads())
    assert model_facts(Heads(swapped=True)) == model_facts(Heads())


def test_the_configuration_of_a_gpt2_counts_key_by_key():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    facts = model_facts(GPT2LMHeadModel(config))
    assert (facts["n_head"], facts["resid_pdrop"]) == (2, 0.1)
    assert facts["layer"]["transformer.h.0.mlp.dropout"] == "Dropout(p=0.1, inplace=False)"


def test_facts_draw_from_no_generator():
    model = Heads()
    states = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
    optimizer = torch.optim.AdamW(model.parameters())
    model_facts(model), optimizer_facts(optimizer)
    after = [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]
    assert after == states


def test_hyperparameters_are_those_before_a_schedule_moved_them():
    optimizer = torch.optim.SGD(Heads().parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    facts = optimizer_facts(optimizer)
    assert (facts["lr"], facts["momentum"], optimizer.param_groups[0]["lr"]) == (0.5, 0.9, 0.05)
    assert "lr" not in scheduler_facts(scheduler)


def test_schedules_inside_a_schedule_count():
    optimizer = torch.optim.SGD(Heads().parameters(), lr=1.0)
    parts = [torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=g) for g in (0.5, 0.1)]
    whole = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])
    facts = scheduler_facts(whole)
    assert [facts[f"schedulers.{i}"]["gamma"] for i in (0, 1)] == [0.5, 0.1]


def test_the_facts_of_a_gpt2_fit_on_a_few_pages():
    with torch.device("meta"):
        facts = model_facts(GPT2LMHeadModel(GPT2Config()))
    assert 5_000 < len(json.dumps(facts)) < 60_000


def test_the_decay_of_an_averaged_model_counts():
    averaged = [
        AveragedModel(nn.Linear(1, 1), multi_avg_fn=get_ema_multi_avg_fn(decay))
        for decay in (0.9, 0.99)
    ]
    assert model_facts(averaged[0]) != model_facts(averaged[1])


def test_the_attention_kernel_of_a_model_inside_counts_wherever_it_was_chosen():
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 16, "n_positions": 8}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    models = [
        nn.Sequential(GPT2LMHeadModel(GPT2Config(**shape, **ends, attn_implementation=kernel)))
        for kernel in ("eager", "sdpa", "eager")
    ]
    models[2][0].set_attn_implementation("sdpa")
    facts = [model_facts(model) for model in models]
    assert facts[0]["0.config"]["attn_implementation"] == "eager"
    assert facts[0] != facts[1] == facts[2]


def one_schedule(make):
    return scheduler_facts(make(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)))


def in_sequence(milestone: int):
    def make(optimizer):
        parts = [schedules.ConstantLR(optimizer, 0.1, 2), schedules.ExponentialLR(optimizer, 0.9)]
        return schedules.SequentialLR(optimizer, parts, [milestone])

    return make


@pytest.mark.parametrize(
    "makes",
    [
        [lambda o, at=at: schedules.MultiStepLR(o, [2, at]) for at in (6, 7)],
        [in_sequence(2), in_sequence(3)],
        [
            lambda o, power=power: schedules.CyclicLR(o, 0.1, 0.2, scale_fn=lambda x: x**power)
            for power in (1, 2)
        ],
    ],
    ids=["milestones", "where parts begin", "a function of the user's"],
)
def test_what_a_schedule_does_not_show_counts(makes):
    first, other = map(one_schedule, makes)
    assert first == one_schedule(makes[0])
    assert first != other


def test_a_method_of_a_partial_counts_by_its_object():
    facts = [callable_facts(partial(Crop(size).__call__)) for size in (1, 2)]
    assert facts[0] != facts[1]


class Crop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, x):
        return x[: self.size]


def test_a_method_put_into_a_class_of_the_user_counts(monkeypatch):
    before = model_facts(Heads())
    monkeypatch.setattr(Heads, "forward", lambda self, x: 3 * x)
    assert model_facts(Heads())["source"] != before["source"]
