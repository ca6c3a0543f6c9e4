"""One training loop, broken in one way at a time: the verdict names the way."""

from __future__ import annotations

import pytest

from check.trials import Trials
from unbroken.check import Culprit, Status

LOST_AT_RESUME = {
    "forgets the weights": Culprit.WEIGHTS,
    "forgets one layer": Culprit.WEIGHTS,
    "forgets the optimizer": Culprit.OPTIMIZER,
    "another weight decay": Culprit.SETTINGS,
    "forgets the scheduler": Culprit.SCHEDULER,
    "forgets the scaler": Culprit.SCALER,
    "forgets the average": Culprit.AVERAGE,
    "forgets the running statistics": Culprit.BUFFERS,
    "forgets a counter of the model": Culprit.MODEL,
    "seeds at each start": Culprit.SEED_RESET,
    "seeds only at the first start": Culprit.GENERATORS,
    "forgets the augmentation": Culprit.AUGMENTATION,
    "forgets the position": Culprit.DATA_RESTARTED,
    "counts one step too few": Culprit.DATA_REPEATED,
    "counts what was read ahead": Culprit.DATA_SKIPPED,
    "skips to the next epoch": Culprit.EPOCH_SKIPPED,
    "forgets the sampler's epoch": Culprit.EPOCH_ORDER,
    "shuffles anew": Culprit.DATA_ORDER,
    "ignores the checkpoint": Culprit.FROM_SCRATCH,
    "is done at once": Culprit.NOTHING_TRAINED,
    "stops too early": Culprit.STEPS_MISSING,
    "fails": Culprit.RESUME_FAILED,
}
LOST_AT_SAVE = {
    "stale save": Culprit.STALE_WEIGHTS,
    "forgets pending gradients": Culprit.ACCUMULATION,
    "never saves": Culprit.NEVER_SAVED,
    "nondeterministic": Culprit.NOT_DETERMINISTIC,
}


@pytest.fixture(scope="module")
def trials(tmp_path_factory, server):
    return Trials(tmp_path_factory.mktemp("plain"), "plain.py", kill_after=10, server=server)


def test_the_loop_that_forgets_nothing_is_exact(trials):
    verdict = trials.verdict()
    assert (verdict.status, verdict.culprit) == (Status.EXACT, Culprit.NONE), verdict
    assert "resumed after step 8; 10 steps" in verdict.words


@pytest.mark.parametrize("bug", LOST_AT_RESUME)
def test_what_the_resume_forgets_is_named(trials, bug):
    verdict = trials.verdict(resumed=("--bug", bug))
    assert (verdict.status, verdict.culprit) == (Status.NOT_EXACT, LOST_AT_RESUME[bug]), verdict


@pytest.mark.parametrize("bug", LOST_AT_SAVE)
def test_what_the_save_does_wrong_is_named(trials, bug):
    verdict = trials.verdict(broken=("--bug", bug))
    assert verdict.culprit is LOST_AT_SAVE[bug], verdict
    is_unknown = bug in ("never saves", "nondeterministic")
    assert verdict.status is (Status.UNKNOWN if is_unknown else Status.NOT_EXACT)


def test_a_position_in_steps_is_found_when_the_batch_size_changes(trials):
    verdict = trials.verdict(resumed=("--bug", "counts in steps", "--batch-size", "2"))
    assert verdict.culprit is Culprit.POSITION_UNITS, verdict
