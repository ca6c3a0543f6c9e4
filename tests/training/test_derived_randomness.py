"""What a model and its callbacks draw depends on the place in the run, and on nothing else."""

from __future__ import annotations

import ast
import random
from io import StringIO

import numpy as np
import pytest
import torch
from torch import nn

from small_trainers import small_trainer
from unbroken.training import Callback

GENERATORS = {
    "python": random.random,
    "numpy": np.random.rand,
    "torch": lambda: float(torch.rand(())),
}
STEPS, PORTIONS = 6, 2  # micro-batches in a step
FORWARD, HOOKED = StringIO(), StringIO()  # notes of one run; a list would come back in a resume
HOOKS = ("on_micro_batch_end", "on_step_end", "on_log", "on_evaluate", "on_save")


def all_draws() -> tuple[float, ...]:
    return tuple(float(draw()) for draw in GENERATORS.values())


class Noted(nn.Linear):
    """A layer that notes what each of its forward passes draws, as dropout would."""

    def __init__(self) -> None:
        super().__init__(6, 4)

    def forward(self, x):
        if self.training:
            FORWARD.write(f"{all_draws()}\n")
        return super().forward(x)


class NotedHooks(Callback):
    """Notes what each call of each hook draws."""


for hook in HOOKS:

    def noted(self, trainer, *more, hook=hook):
        HOOKED.write(f"{(hook, all_draws())}\n")

    setattr(NotedHooks, hook, noted)


def clear() -> None:
    for notes in (FORWARD, HOOKED):
        notes.seek(0)
        notes.truncate()


def noted_in(notes: StringIO) -> list:
    return [ast.literal_eval(line) for line in notes.getvalue().splitlines()]


def train(folder, until=STEPS, **settings):
    """Train; return what forward passes drew, and what hooks drew."""
    torch.manual_seed(5)
    clear()
    settings = {"max_steps": until, "micro_batch_size": 4, "eval_steps": 1, **settings}
    parts = {"callbacks": [NotedHooks()], "eval_dataset": [(torch.ones(6), torch.tensor(0))]}
    constant = {"lr_scheduler_type": "constant", "save_steps": 1}
    small_trainer(folder, model=Noted(), trainer=parts, **constant, **settings).train()
    return noted_in(FORWARD), noted_in(HOOKED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("generator", range(len(GENERATORS)), ids=GENERATORS)
def test_every_forward_pass_draws_other_numbers(generator, whole):
    drawn = [draws[generator] for draws in whole[0]]
    assert len(drawn) == STEPS * PORTIONS
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("generator", range(len(GENERATORS)), ids=GENERATORS)
def test_every_call_of_a_hook_draws_other_numbers(generator, whole):
    drawn = [draws[generator] for _, draws in whole[1]]
    assert len(drawn) == STEPS * (len(HOOKS) - 1 + PORTIONS) + 1  # it is saved at its start, too
    assert len(set(drawn)) == len(drawn)


def test_hooks_and_forward_passes_draw_none_of_each_others_numbers(whole):
    forward, hooks = ({one for draws in part for one in draws} for part in plain(whole))
    assert not forward & hooks


def plain(whole):
    return whole[0], [draws for _, draws in whole[1]]


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_draws_the_numbers_of_its_place(step, whole, tmp_path):
    begun = train(tmp_path, until=step)
    resumed = train(tmp_path)
    assert begun[0] + resumed[0] == whole[0]
    assert begun[1] + resumed[1] == whole[1]


def test_another_seed_draws_other_numbers(whole, tmp_path):
    assert not set(train(tmp_path, seed=1)[0]) & set(whole[0])


def test_a_hook_that_draws_leaves_the_forward_passes_their_numbers(whole, tmp_path):
    torch.manual_seed(5)
    clear()
    small_trainer(tmp_path, model=Noted(), max_steps=STEPS, micro_batch_size=4).train()
    assert whole[0] == noted_in(FORWARD)
