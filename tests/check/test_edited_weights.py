"""Weights that something else than an optimizer changes are known too."""

from __future__ import annotations

import pytest

from check.trials import Trials
from unbroken.check import Culprit, Status


@pytest.fixture(scope="module")
def trials(tmp_path_factory, server):
    return Trials(tmp_path_factory.mktemp("edits"), "edits.py", kill_after=6, server=server)


def test_weights_clamped_between_steps_and_a_trial_run_of_the_model_are_no_difference(trials):
    verdict = trials.verdict()
    assert (verdict.status, verdict.culprit) == (Status.EXACT, Culprit.NONE), verdict
    assert "resumed after step 4; 8 steps" in verdict.words


def test_weights_saved_before_they_were_clamped_are_named(trials):
    verdict = trials.verdict(broken=("--bug", "saves before it clamps"))
    assert (verdict.status, verdict.culprit) == (Status.NOT_EXACT, Culprit.WEIGHTS), verdict
    assert "those that the optimizer's step 4 left" in verdict.words
