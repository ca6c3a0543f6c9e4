"""Where the host's own Trainer does not go on exactly: seen here, and in ours it does."""

from __future__ import annotations

import pytest
from transformers.trainer_pt_utils import AcceleratorConfig

from adapters.kill_cases import CASES

# What goes wrong in the host's own, and after which step it is killed.
NOT_EXACT = {
    "random masks": 8,
    "random masks, two workers": 8,
    "augmentation": 8,
    "lengths grouped": 18,
    "a stream that wraps": 18,
}


@pytest.mark.stock
@pytest.mark.parametrize("name", NOT_EXACT)
def test_the_hosts_own_is_another_run_after_a_kill(name, run, uninterrupted):
    case = {"trainer": "stock", **CASES[name]}
    run(kill_at=NOT_EXACT[name], **case)
    assert run(resume=True, **case).digest != uninterrupted(**case).digest


@pytest.mark.stock
def test_the_hosts_own_forgets_what_callbacks_have_counted(run):
    case = {"trainer": "stock", **CASES["two counters of one class"]}
    run(kill_at=13, **case)
    assert run(resume=True, **case).counters == [26, 260]


@pytest.mark.stock
def test_the_hosts_own_brings_back_the_first_state_of_two_counters(run):
    case = {"trainer": "stock", **CASES["two counters of one class"]}
    restored = {"args": {"restore_callback_states_from_checkpoint": True}}
    run(kill_at=13, **case)
    assert run(resume=True, **case, **restored).counters != [36, 360]


@pytest.mark.stock
def test_the_patience_of_the_hosts_own_begins_anew(run, uninterrupted):
    case = {"trainer": "stock", **CASES["patience, and the best at the end"]}
    whole = uninterrupted(**case)
    run(kill_at=whole.step - 1, **case)
    assert run(resume=True, **case).step > whole.step


@pytest.mark.stock
def test_the_hosts_own_logs_another_loss_after_a_resume(run, uninterrupted):
    run(trainer="stock", kill_at=6)
    resumed, whole = run(trainer="stock", resume=True), uninterrupted(trainer="stock")
    assert resumed.digest == whole.digest
    assert resumed.log[1]["loss"] != whole.log[1]["loss"]  # of step 6; the checkpoint is of 5
    assert resumed.train_loss != whole.train_loss


@pytest.mark.stock
def test_the_hosts_own_ends_with_status_0_when_it_is_stopped(run):
    jit = {"args": {"enable_jit_checkpoint": True, "max_steps": 4000, "num_train_epochs": 400}}
    stopped = run(trainer="stock", kill_at=6, signal=15, **jit)
    assert stopped.status == 0
    assert stopped.step < 4000


@pytest.mark.stock
def test_the_hosts_own_warns_of_a_missing_key_that_is_not_missing(run):
    run(trainer="stock", kill_at=8)
    assert "missing keys" in run(trainer="stock", resume=True).text


def test_ours_does_not(run):
    run(kill_at=8)
    assert "missing keys" not in run().text


@pytest.mark.stock
def test_the_hosts_own_takes_no_loader_that_knows_its_place():
    with pytest.raises(TypeError, match="use_stateful_dataloader"):
        AcceleratorConfig(use_stateful_dataloader=True)


@pytest.mark.stock
def test_the_order_of_the_hosts_own_hangs_on_the_seed_at_the_resume(run, uninterrupted):
    run(trainer="stock", kill_at=18)
    resumed = run(trainer="stock", resume=True, reseed=7)
    assert resumed.digest != uninterrupted(trainer="stock").digest


@pytest.mark.parametrize("kill_at", [14, 18])
def test_the_order_of_ours_does_not(kill_at, run, uninterrupted):
    case = {"args": {"save_steps": 12}} if kill_at == 14 else {}
    run(kill_at=kill_at, **case)
    assert run(reseed=7, **case).digest == uninterrupted().digest
