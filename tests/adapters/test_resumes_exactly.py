"""Our Trainer is the host's where nobody interrupts it, and the same run where somebody does."""

from __future__ import annotations

import signal

import pytest

from adapters.kill_cases import CASES, PLAIN

# Of 36 steps in 3 epochs of 12; saved every 5 steps, or as the case says.
BEFORE_THE_FIRST_SAVE, IN_EPOCH_1, AT_AN_EPOCH_END, IN_EPOCH_3 = 3, 8, 12, 29
KILLS = dict.fromkeys(CASES, (IN_EPOCH_3,))
KILLS["random masks"] = KILLS["augmentation, two workers"] = (IN_EPOCH_1, AT_AN_EPOCH_END + 6)
KILLS["shuffled"] = (1, BEFORE_THE_FIRST_SAVE, IN_EPOCH_1, AT_AN_EPOCH_END, 18, IN_EPOCH_3)
KILLS["accumulation with a remainder"] = KILLS["batches of no loader, accumulated"] = (3, 7)
KILLS["evaluation at epoch ends"] = (AT_AN_EPOCH_END + 1, IN_EPOCH_3)
KILLS["saves at epoch ends"] = (AT_AN_EPOCH_END + 1, IN_EPOCH_3)
KILLS["patience, and the best at the end"] = (5,)
POINTS = [(name, kill) for name, kills in KILLS.items() for kill in kills]


@pytest.mark.parametrize("name", PLAIN)
def test_an_uninterrupted_run_has_the_bits_of_the_hosts_own(name, uninterrupted):
    ours = uninterrupted(**PLAIN[name])
    assert ours.bits == uninterrupted(trainer="stock", **PLAIN[name]).bits
    assert ours.step > 0


@pytest.mark.parametrize(("name", "kill_at"), POINTS)
def test_a_killed_run_is_the_same_run(name, kill_at, run, uninterrupted):
    assert run(kill_at=kill_at, **CASES[name]).status == -signal.SIGKILL
    resumed = run(**CASES[name])
    assert resumed.bits == uninterrupted(**CASES[name]).bits
    assert resumed.first_step <= kill_at + 1
    assert resumed.first_step > 1 or kill_at <= BEFORE_THE_FIRST_SAVE
    first, *told = resumed.report
    assert first.endswith(": exact") or first.startswith("no checkpoint yet")
    expected = ("took over from a process", "step")  # a kill may leave no step to repeat
    assert [one for one in told if not one.startswith(expected)] == []
    assert all(line.endswith("repeated with the same bits") for line in told if "step" in line[:4])


def test_a_run_killed_again_and_again_is_the_same_run(run, uninterrupted):
    case = CASES["augmentation, two workers"]
    for kill_at in (7, 11, 16, 22, 34):
        assert run(kill_at=kill_at, **case).status == -signal.SIGKILL
    assert run(**case).bits == uninterrupted(**case).bits


@pytest.mark.parametrize("after", [5, 10])
def test_a_kill_right_after_a_save_loses_no_step(after, run, uninterrupted):
    run(kill_at=after, after_save=True)
    resumed = run()
    assert resumed.first_step == after + 1
    assert resumed.bits == uninterrupted().bits


def test_a_finished_run_that_is_started_again_trains_nothing_and_says_the_same(run):
    first = run()
    again = run()
    assert again.first_step is None
    assert "finished at step 36 of 36 already; nothing to do" in again.text
    assert (again.digest, again.train_loss) == (first.digest, first.train_loss)


# What a kill would do if a part were not brought back: each must be seen by the tests above.
SABOTAGE = {
    "random states": "shuffled",
    "place": "shuffled",
    "losses": "shuffled",
    "callbacks": "two counters of one class",
    "order": "lengths grouped",
    "keys": "augmentation",
}


@pytest.mark.parametrize("part", SABOTAGE)
def test_a_part_that_is_left_out_is_seen(part, run, uninterrupted):
    case = CASES[SABOTAGE[part]]
    run(kill_at=18, sabotage=part, **case)
    resumed = run(sabotage=part, allow=["data"], **case)  # else another order is refused
    assert resumed.bits != uninterrupted(**case).bits


def test_an_order_that_was_not_brought_back_is_refused(run):
    case = CASES[SABOTAGE["order"]]
    run(kill_at=18, sabotage="order", **case)
    refused = run(sabotage="order", **case)
    assert refused.status == 1
    assert "what is read again is not what the run was trained on" in refused.text


ACCUMULATED = {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": "all"}


@pytest.mark.parametrize("raises_at", [3, 8])
def test_what_an_exception_left_of_a_step_is_not_counted_when_the_same_trainer_goes_on(
    raises_at, run, uninterrupted
):
    case = {"callbacks": "two counters", "args": ACCUMULATED | {"save_steps": 2}}
    again = run(raises_at=raises_at, **case)
    assert again.bits == uninterrupted(**case).bits
    assert again.flos > 0


def test_a_finished_run_says_what_transformers_own_would_make_of_its_checkpoints(run):
    assert "unbroken export RUN TARGET --to transformers" in run().text


def test_a_stop_leaves_a_step_to_compare_where_that_is_asked_for(run, uninterrupted):
    case = {**CASES["shuffled"], "confirm_stops": True}
    assert run(kill_at=7, signal=signal.SIGTERM, **case).status == 75
    resumed = run(**case)
    assert resumed.bits == uninterrupted(**CASES["shuffled"]).bits
    assert "step 8 repeated with the same bits" in resumed.report
    assert "the state is as it was at the stop" in resumed.report
