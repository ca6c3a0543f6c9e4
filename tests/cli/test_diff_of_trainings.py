"""diff of real runs: what broke off is the same; what was changed is found wherever it acts."""

from __future__ import annotations

import json

import pytest

from small_trainers import small_trainer
from unbroken.training import Callback


class BreakOff(Callback):
    """Fails after the third step, which no checkpoint has."""

    def on_step_end(self, trainer):
        return 1 / (3 - trainer.progress.step)


@pytest.fixture
def whole(here):
    small_trainer(here / "whole").train()


@pytest.fixture
def diff(unbroken):
    """Compare two runs; return the status, and the differences by their paths."""

    def diff(a, b):
        status, output, _ = unbroken("diff", a, b, "--values", "--json")
        found = json.loads(output)
        values = [one for group in found["groups"] for one in group["differences"]]
        return status, {one["path"]: one for one in [*values, *found["tensors"]["differences"]]}

    return diff


def test_a_run_that_broke_off_and_was_continued_is_the_same(whole, here, diff):
    with pytest.raises(ZeroDivisionError):
        small_trainer(here / "broken", trainer={"callbacks": [BreakOff()]}).train()
    assert diff("whole", "broken")[0] == 1
    small_trainer(here / "broken").train()
    assert diff("whole", "broken") == (0, {})


def test_another_learning_rate_is_found_wherever_it_acts(whole, here, diff):
    small_trainer(here / "other", learning_rate=0.02).train()
    status, found = diff("whole", "other")
    assert status == 1
    assert {"config.learning_rate", "scheduler.base_lrs.0", "model.0.weight"} <= {*found}
    assert found["model.0.weight"]["values"]["max_ulp"] > 0
    assert not [path for path in found if path.startswith(("rng", "data", "environment"))]
