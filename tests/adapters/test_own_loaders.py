"""Subclasses that make the training loader themselves: it continues exactly, or says why not."""

from __future__ import annotations

import signal

import pytest

from adapters.kill_cases import CASES

IN_EPOCH_2, AT_AN_EPOCH_END = 19, 12
OWN = [name for name, case in CASES.items() if "loader" in case]


@pytest.mark.parametrize("name", [name for name in OWN if "accumulated" not in name])
def test_a_loader_of_the_users_own_is_continued_at_the_edge_and_inside_of_an_epoch(
    name, run, uninterrupted
):
    for kill_at in (AT_AN_EPOCH_END, IN_EPOCH_2):
        assert run(kill_at=kill_at, **CASES[name]).status == -signal.SIGKILL
    resumed = run(**CASES[name])
    assert resumed.bits == uninterrupted(**CASES[name]).bits
    assert not any(line.startswith("data") for line in resumed.report)
    assert resumed.first_step == 16


@pytest.mark.parametrize("saved", [12, 5])
def test_one_that_is_another_when_it_is_read_again_is_refused_before_the_next_step(saved, run):
    case = {"loader": "batches of the hour", "args": {"save_steps": saved}}
    assert run(kill_at=IN_EPOCH_2, **case).status == -signal.SIGKILL
    refused = run(**case)
    assert refused.status == 1
    assert "get_train_dataloader: " in refused.text
    assert "what is read again is not what the run was trained on" in refused.text
    assert refused.values == {}


def test_other_data_in_a_loader_of_the_users_own_are_told(run):
    assert run(kill_at=IN_EPOCH_2, loader="plain").status == -signal.SIGKILL
    refused = run(loader="plain", changed_data=True)
    assert refused.status == 1
    assert "DifferenceError" in refused.text
    assert "data.records" in refused.text


OF_8 = {"loader": "of 8", "args": {"save_steps": 4, "lr_scheduler_type": "constant"}}


@pytest.mark.parametrize("kill_at", [7, 11])
def test_a_loader_of_another_batch_size_than_that_of_the_arguments_is_continued(
    kill_at, run, uninterrupted
):
    assert run(kill_at=kill_at, **OF_8).status == -signal.SIGKILL
    resumed = run(**OF_8)
    assert (resumed.step, resumed.first_step) == (18, kill_at // 4 * 4 + 1)
    assert resumed.bits == uninterrupted(**OF_8).bits
    assert resumed.report[0].endswith(": exact")


def test_a_loader_whose_batch_size_changes_is_refused_with_both_sizes(run):
    assert run(kill_at=7, **OF_8).status == -signal.SIGKILL
    refused = run(**{**OF_8, "loader": "of 6"})
    assert refused.status == 1
    assert "total_batch_size: stored 8, now 6" in refused.text
