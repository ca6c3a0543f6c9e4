"""What training keeps on a subclass of the host's Trainer, and in callbacks, comes back."""

from __future__ import annotations

import pytest

from adapters.kill_cases import PATIENCE, WORKERS

SHORT = {"args": {"max_steps": 8, "save_steps": 3}, "callbacks": {"level": [2]}}


@pytest.mark.parametrize("how", ["a teacher", "a table", "a state of its own"])
def test_what_a_subclass_of_the_trainer_keeps_comes_back(how, run, uninterrupted):
    case = {"keeps": how, **SHORT}
    run(kill_at=5, **case)
    resumed, whole = run(**case), uninterrupted(**case)
    assert (resumed.bits, resumed.kept) == (whole.bits, whole.kept)
    assert "not covered" not in resumed.text


def test_attributes_that_are_left_out_are_seen(run, uninterrupted):
    case = {"keeps": "a table", **SHORT}
    run(kill_at=5, **case)
    assert run(sabotage="attributes", **case).bits != uninterrupted(**case).bits


def test_an_average_that_training_makes_is_named_and_the_resume_not_called_exact(run):
    case = {"keeps": "made late", **SHORT}
    run(kill_at=5, **case)
    report = run(**case).report
    assert "not known to be exact" in report[0]
    assert any(line.startswith("trainer.average: not covered") for line in report)


@pytest.mark.parametrize("at_edges", [True, False])
def test_data_changed_while_workers_hold_copies_are_never_called_exact(at_edges, run):
    case = {"callbacks": {"data": [at_edges]}, "args": WORKERS}
    run(kill_at=17, **case)
    report = run(**case).report
    assert any(line.startswith("data.level: not covered") for line in report) is not at_edges


def patient(patience: int, threshold: float = 0.0) -> dict:
    return {"callbacks": {"patience": [patience, threshold]}, "args": {**PATIENCE, "save_steps": 2}}


def test_less_patience_is_told_and_ends_the_run_where_it_would(run):
    run(kill_at=5, **patient(30))
    ended = run(**patient(1, 100.0))
    assert ended.step == 6
    told = "callbacks.EarlyStoppingCallback.args.early_stopping_patience: stored 30, now 1"
    assert any(line.startswith(told) for line in ended.report), ended.report
    assert ended.report[0].endswith("equivalent")


def test_a_run_that_patience_ended_goes_on_with_more_of_it(run):
    assert run(**patient(1, 100.0)).step == 4
    assert run(**patient(1, 100.0)).step == 4
    longer = run(**patient(3, 100.0))
    assert longer.step == 8, longer.text


def test_a_callback_of_the_host_with_a_state_comes_and_goes_by_name(run):
    run(kill_at=7)
    refused = run(callbacks={"counter": [1]})
    assert "allow=['callbacks.Counting']" in refused.text
    allowed = run(kill_at=11, callbacks={"counter": [1]}, allow=["callbacks.Counting"])
    assert "callbacks.Counting" in allowed.text
    assert run(allow=["callbacks"]).step == 36
