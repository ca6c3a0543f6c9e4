"""Checkpoints of the host's own Trainer that lack something: told, and gone on from as they can."""

from __future__ import annotations

import pytest

from adapters.kill_cases import PLAIN

GROUPED = PLAIN["lengths grouped"]
# The host reads one batch more than it uses, where a run ends inside of an epoch.
SKIP = {"args": {"ignore_data_skip": True}}
JIT = {"args": {"enable_jit_checkpoint": True, "gradient_accumulation_steps": 2}}
ONLY_MODEL = {"args": {"save_only_model": True}}


def test_lengths_grouped_in_the_first_epoch_go_on_as_the_hosts_own_would(run, uninterrupted):
    run(trainer="stock", kill_at=8, **GROUPED)
    resumed = run(**GROUPED)
    assert resumed.first_step == 6
    assert resumed.digest == uninterrupted(trainer="stock", **GROUPED).digest


def test_a_kill_after_that_draws_the_same_order_again(run, uninterrupted):
    run(trainer="stock", kill_at=8, **GROUPED)
    run(kill_at=6, **GROUPED)
    assert run(**GROUPED).digest == uninterrupted(trainer="stock", **GROUPED).digest


def test_an_order_that_a_stock_checkpoint_does_not_hold_is_told(run):
    run(trainer="stock", kill_at=18, **GROUPED)
    refused = run(**GROUPED)
    assert refused.status == 1
    assert "data.order: stored an order of epoch 1 that the checkpoint does not" in refused.text
    assert run(allow=["data.order"], **GROUPED).first_step == 16


@pytest.mark.stock
def test_the_hosts_own_reads_samples_twice_there_without_a_word(run, uninterrupted):
    case = {"trainer": "stock", **GROUPED}
    run(kill_at=18, **case)
    resumed = run(resume=True, **case)
    assert resumed.status == 0
    assert resumed.digest != uninterrupted(**case).digest


@pytest.mark.stock
def test_the_hosts_own_begins_the_epoch_anew_if_it_is_not_to_skip(run):
    run(trainer="stock", kill_at=8)
    resumed = run(trainer="stock", resume=True, **SKIP)
    assert (resumed.first_step, len(resumed.read)) == (6, (36 - 5 + 1) * 4)


@pytest.mark.parametrize("first", ["stock", "ours"])
def test_ours_begins_the_epoch_anew_too_and_says_so(first, run):
    run(trainer=first, kill_at=8)
    resumed = run(**SKIP)
    assert (resumed.first_step, resumed.step, len(resumed.read)) == (6, 36, (36 - 5 + 1) * 4)
    assert "ignore_data_skip: stored 20 samples into epoch 0, now its beginning" in resumed.text


def test_ours_does_so_with_the_bits_of_the_hosts_own(run):
    for trainer in ("stock", "ours"):
        run(trainer, trainer=trainer, kill_at=8)
    stock = run("stock", trainer="stock", resume=True, **SKIP)
    assert run("ours", **SKIP).digest == stock.digest


def test_at_the_edge_of_an_epoch_there_is_nothing_to_skip(run, uninterrupted):
    edges = {"save_steps": 12}
    run(kill_at=14, args=edges)
    resumed = run(args={**edges, **SKIP["args"]})
    assert resumed.digest == uninterrupted().digest
    assert "ignore_data_skip" not in resumed.text


@pytest.mark.stock
def test_the_hosts_own_is_another_run_after_a_stop_inside_of_a_window(run, uninterrupted):
    case = {"trainer": "stock", **JIT}
    assert run(stop_in_window_after=6, **case).status == 0
    assert (run.folder / "run/checkpoint-6").exists()
    assert run(resume=True, **case).digest != uninterrupted(**case).digest


@pytest.mark.stock
def test_the_hosts_own_trains_on_without_moments_where_only_the_model_was_saved(run):
    case = {"trainer": "stock", **ONLY_MODEL}
    run(kill_at=13, **case)
    resumed = run(resume=True, **case)
    assert (resumed.status, resumed.first_step) == (0, 11)
    assert resumed.rates["11"] < 0.0005  # the warm-up again


def test_ours_says_that_such_a_checkpoint_has_no_optimizer(run):
    run(trainer="stock", kill_at=13, **ONLY_MODEL)
    refused = run()
    assert refused.status == 1
    assert "checkpoint-10: optimizer.pt is missing" in refused.text


def test_more_accumulation_over_a_stock_checkpoint_keeps_the_place(run):
    run(trainer="stock", kill_at=13)
    more = {"args": {"gradient_accumulation_steps": 4}}
    assert "gradient_accumulation_steps: stored 1, now 4" in run(**more).text
    resumed = run(allow=["gradient_accumulation_steps"], **more)
    assert len(resumed.read) == 3 * 48 - 10 * 4


def test_larger_batches_over_a_stock_checkpoint_keep_the_place(run):
    run(trainer="stock", kill_at=13)
    larger = {"args": {"per_device_train_batch_size": 8}}
    resumed = run(allow=["per_device_train_batch_size"], **larger)
    assert len(resumed.read) == 3 * 48 - 10 * 4
