"""Arguments that a second start changes: what the host's own does with them, and what ours does."""

from __future__ import annotations

import pytest

LOWER = {"args": {"learning_rate": 1e-4}}
LR_11_OF_OLD, LR_11_OF_NEW = 0.000886505, 0.0000886505


def killed(run, trainer="ours", **order):
    run(trainer=trainer, kill_at=13, **order)
    return str(run.folder / "run/checkpoint-10")


def refused(outcome, name):
    return outcome.status == 1 and "DifferenceError" in outcome.text and name in outcome.text


@pytest.mark.stock
def test_the_hosts_own_does_not_look_at_the_checkpoint_in_its_arguments(run):
    path = killed(run, "stock")
    assert run(trainer="stock", args={"resume_from_checkpoint": path}).first_step == 1


@pytest.mark.stock
def test_the_hosts_own_takes_no_checkpoint_when_it_is_made(run):
    started = run(trainer="stock", start=killed(run, "stock"))
    assert "unexpected keyword argument 'resume_from_checkpoint'" in started.text


def test_ours_resumes_what_its_arguments_say(run, uninterrupted):
    path = killed(run)
    for said in ({"args": {"resume_from_checkpoint": path}}, {"start": path}, {"resume": path}):
        resumed = run(**said)
        assert (resumed.first_step, resumed.digest) == (11, uninterrupted().digest)


@pytest.mark.parametrize("word", ["auto", "latest", "last", True, 10, "10"])
def test_ours_knows_words_and_steps(word, run):
    killed(run)
    assert run(start=word).first_step == 11


def test_latest_is_an_error_where_there_is_none_and_auto_is_a_fresh_start(run):
    assert run(resume="latest").status == 1
    assert run(resume="auto").first_step == 1


def test_never_begins_anew_and_sets_the_old_ones_aside(run):
    killed(run)
    assert run(resume=False).first_step == 1
    assert (run.folder / "run/set-aside/checkpoint-10.1/manifest.json").exists()


def test_callbacks_find_the_run_at_the_epoch_where_it_was(run):
    killed(run)
    assert run().begun_at_epoch == pytest.approx(10 / 12)


NEW = [{}, LOWER["args"], {"warmup_steps": 1}]


@pytest.mark.parametrize("args", NEW, ids=str)
def test_a_schedule_that_skip_names_begins_anew_whatever_else_changed(args, run, uninterrupted):
    killed(run)
    resumed, fresh = run(skip=["scheduler"], allow=[*args], args=args), uninterrupted(args=args)
    assert resumed.first_step == 11, resumed.text
    steps = range(1, 11)
    rates = [resumed.rates[str(10 + step)] for step in steps]
    assert rates == [fresh.rates[str(step)] for step in steps]


OPTIONS = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 0.25, "weight_decay": 0.125}


def test_ours_trains_with_every_option_of_the_optimizer_that_is_allowed(run):
    killed(run)
    assert all(refused(run(args=OPTIONS), name) for name in OPTIONS)
    resumed = run(args={**OPTIONS, "max_steps": 12}, allow=[*OPTIONS, "max_steps"])
    assert resumed.first_step == 11
    assert resumed.options == {"betas": [0.5, 0.75], "eps": 0.25, "weight_decay": 0.125}


@pytest.mark.stock
def test_the_hosts_own_ignores_another_learning_rate(run, uninterrupted):
    killed(run, "stock")
    resumed = run(trainer="stock", resume=True, **LOWER)
    assert resumed.digest == uninterrupted().digest
    assert resumed.rates["11"] == pytest.approx(LR_11_OF_OLD, rel=1e-3)


def test_ours_refuses_another_learning_rate_that_nobody_names(run):
    killed(run)
    assert refused(run(**LOWER), "learning_rate: stored 0.001, now 0.0001")


def test_ours_trains_at_another_learning_rate_that_is_allowed(run):
    killed(run)
    resumed = run(allow=["learning_rate"], **LOWER)
    assert resumed.rates["11"] == pytest.approx(LR_11_OF_NEW, rel=1e-3)
    assert any("learning_rate: stored 0.001, now 0.0001" in line for line in resumed.report)


def test_who_names_a_checkpoint_means_the_learning_rate_given_with_it(run):
    resumed = run(start=killed(run), **LOWER)
    assert resumed.rates["11"] == pytest.approx(LR_11_OF_NEW, rel=1e-3)
    assert any("learning_rate: stored 0.001, now 0.0001" in line for line in resumed.report)


@pytest.mark.stock
def test_the_hosts_own_keeps_the_old_cadence_of_saves(run):
    killed(run, "stock")
    run(trainer="stock", resume=True, args={"save_steps": 4})
    assert not (run.folder / "run/checkpoint-16").exists()


def test_ours_saves_at_the_cadence_given(run, uninterrupted):
    killed(run)
    assert run(args={"save_steps": 4}).digest == uninterrupted().digest
    assert (run.folder / "run/checkpoint-16").exists()


@pytest.mark.stock
def test_the_learning_rate_of_the_hosts_own_jumps_without_a_word_in_a_longer_run(run):
    killed(run, "stock")
    resumed = run(trainer="stock", resume=True, args={"num_train_epochs": 6})
    assert resumed.rates["11"] > 1.05 * LR_11_OF_OLD


def test_ours_says_what_a_longer_run_does_to_the_learning_rate(run):
    killed(run)
    assert refused(run(args={"num_train_epochs": 6}), "num_train_epochs: stored 3, now 6")
    resumed = run(args={"num_train_epochs": 6}, allow=["num_train_epochs"])
    assert resumed.step == 72
    told = "another schedule: step 11 has the learning rate 0.00"
    assert any(told in line and "in one of 36" in line for line in resumed.report)
    assert resumed.rates["11"] > 1.05 * LR_11_OF_OLD
    assert run(args={"num_train_epochs": 6}).step == 72


@pytest.mark.stock
def test_the_hosts_own_never_reads_some_samples_in_larger_batches(run):
    killed(run, "stock")
    larger = {"per_device_train_batch_size": 8, "num_train_epochs": 2}
    resumed = run(trainer="stock", resume=True, args=larger)
    assert len(resumed.read) < 2 * 48 - 10 * 4  # what two epochs have left


def test_ours_reads_each_sample_once_in_larger_batches(run):
    killed(run)
    larger = {"per_device_train_batch_size": 8, "num_train_epochs": 2}
    resumed = run(args=larger, allow=["per_device_train_batch_size", "num_train_epochs"])
    assert len(resumed.read) == 2 * 48 - 10 * 4
    assert sorted(resumed.read[8:]) == list(range(48))  # the second epoch is whole


@pytest.mark.stock
def test_the_hosts_own_is_done_at_once_with_more_accumulation(run):
    killed(run, "stock")
    more = {"gradient_accumulation_steps": 4}
    assert run(trainer="stock", resume=True, args=more).first_step is None


@pytest.mark.parametrize("accumulation", [2, 4, 5])
def test_ours_trains_the_rest_with_more_accumulation(accumulation, run):
    killed(run)
    more = {"gradient_accumulation_steps": accumulation}
    resumed = run(args=more, allow=["gradient_accumulation_steps"])
    assert len(resumed.read) == 3 * 48 - 10 * 4
    assert resumed.step == 10 + -(-2 // accumulation) + 2 * -(-12 // accumulation)


def test_a_run_with_more_accumulation_is_exact_from_there_on(run):
    more = {"args": {"gradient_accumulation_steps": 5, "save_steps": 1}}
    killed(run)
    named = {
        "start": str(run.folder / "run/checkpoint-5"),
        "allow": ["gradient_accumulation_steps"],
    }
    whole = run("whole", **named, **more)
    run("cut", kill_at=8, **named, **more)
    assert run("cut", **more).digest == whole.digest


SILENT = {
    "seed": {"args": {"seed": 7}},
    "bf16": {"args": {"bf16": True}},
    "max_grad_norm": {"args": {"max_grad_norm": 0.1}},
    "weight_decay": {"args": {"weight_decay": 0.5}},
    "adam_beta1": {"args": {"adam_beta1": 0.5}},
    "lr_scheduler_type": {"args": {"lr_scheduler_type": "linear"}},
    "warmup_steps": {"args": {"warmup_steps": 20}},
    "model.resid_pdrop": {"model": {"resid_pdrop": 0.4}},
    "model.n_head": {"model": {"n_head": 4}},
    "data.records": {"changed_data": True},
    "data.length": {"samples": 40},
}


@pytest.mark.stock
@pytest.mark.parametrize("name", SILENT)
def test_the_hosts_own_takes_a_change_without_a_word(name, run):
    killed(run, "stock")
    resumed = run(trainer="stock", resume=True, **SILENT[name])
    assert resumed.status == 0
    assert "differ" not in resumed.text


@pytest.mark.parametrize("name", SILENT)
def test_ours_names_the_change_before_the_first_step(name, run):
    killed(run)
    assert refused(run(**SILENT[name]), name)


@pytest.mark.stock
def test_the_hosts_own_fails_late_on_another_optimizer(run):
    killed(run, "stock")
    resumed = run(trainer="stock", resume=True, args={"optim": "sgd"})
    assert resumed.status == 1
    assert "KeyError" in resumed.text


def test_ours_refuses_another_optimizer_by_name(run):
    killed(run)
    assert refused(run(args={"optim": "sgd"}), "optim: stored adamw_torch_fused, now sgd")


@pytest.mark.stock
def test_the_hosts_own_trains_on_after_the_end(run):
    killed(run, "stock")
    resumed = run(trainer="stock", resume=True, args={"max_steps": 8})
    assert resumed.first_step == 11


def test_ours_trains_nothing_after_the_end_and_says_so(run):
    killed(run)
    resumed = run(args={"max_steps": 8})
    assert (resumed.first_step, resumed.step) == (None, 10)
    assert "max_steps: stored -1, now 8" in resumed.text


@pytest.mark.stock
def test_the_hosts_own_puts_moments_on_other_parameters(run, uninterrupted):
    killed(run, "stock")
    resumed = run(trainer="stock", resume=True, reordered=True)
    assert resumed.status == 0
    assert resumed.digest != uninterrupted().digest


def test_ours_keeps_moments_with_the_names_of_their_parameters(run, uninterrupted):
    killed(run)
    assert run(reordered=True, allow=["model"]).digest == uninterrupted().digest


@pytest.mark.stock
def test_the_hosts_own_fails_on_layers_that_the_checkpoint_has_not(run):
    killed(run, "stock")
    resumed = run(trainer="stock", resume=True, model={"n_layer": 3})
    assert resumed.status == 1
    assert "parameter group" in resumed.text


def test_ours_refuses_layers_that_the_checkpoint_has_not(run):
    killed(run)
    assert "StateMismatchError" in run(model={"n_layer": 3}).text
