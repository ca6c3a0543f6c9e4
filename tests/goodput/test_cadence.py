"""How often a run saves by itself: never worse than any other interval, within the limits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbroken.goodput import FailureRate, Observed, Rhythm, SaveInterval, UsualCost
from unbroken.planner import simulate

HOUR = 3600.0
COSTS = st.builds(
    lambda lost, more: UsualCost(lost, lost + more), st.floats(1e-3, 300.0), st.floats(0, 300)
)
GRID = [1.25**n for n in range(-10, 60)]  # seconds: 0.1 s to 6 days


@given(cost=COSTS, mean=st.floats(60.0, 1e6))
def test_no_interval_of_a_grid_loses_less_time(cost, mean):
    found = SaveInterval.best(cost, FailureRate(mean, "given")).seconds
    own = Rhythm(found, cost.lost, 0, 0, mean).goodput
    durable = [seconds for seconds in GRID if seconds >= cost.durable]
    assert own >= max(Rhythm(seconds, cost.lost, 0, 0, mean).goodput for seconds in durable) - 1e-9


def test_played_event_by_event_a_tenth_and_ten_times_of_it_are_worse():
    best = SaveInterval.best(UsualCost(5, 5), FailureRate(HOUR, "given")).seconds
    play = lambda seconds: simulate(Rhythm(seconds, 5, 0, 60, HOUR), random.Random(0)).goodput  # noqa: E731
    assert play(best) > max(play(best / 10), play(best * 10)) + 0.05


@given(cost=COSTS, mean=st.floats(60.0, 1e6), most=st.floats(1, 1e4), step=st.floats(0.01, 100))
def test_a_failure_never_takes_more_than_the_limit_if_saves_are_quick_enough(
    cost, mean, most, step
):
    found = SaveInterval.best(cost, FailureRate(mean, "given"), most=most, step_seconds=step)
    is_quick = 2 * cost.durable + step <= most
    assert found.seconds >= cost.durable
    assert not is_quick or found.seconds + step + cost.durable <= most * (1 + 1e-9)


def test_a_limit_stands_alone_too():
    assert SaveInterval.best(UsualCost(1, 2), None, most=60, step_seconds=3).seconds == 55


def test_until_a_save_is_measured_it_is_ten_minutes_at_most():
    assert SaveInterval.best(None, FailureRate(1e9, "given")).seconds == 600
    assert SaveInterval.best(None, FailureRate(HOUR, "given")).seconds == pytest.approx(
        84.2, abs=0.1
    )


def test_the_line_names_every_reason():
    failures = FailureRate(3.1 * HOUR, "observed", 7)
    found = SaveInterval.best(UsualCost(0.05, 1), failures, most=600, step_seconds=0.081)
    assert str(found) == (
        "saves every 412 steps (33 s): a save costs 0.05 s, failures every 3.1 h (7 observed), "
        "to lose 10.0 min at most"
    )


def test_a_long_step_is_saved_each_time():
    found = SaveInterval.best(UsualCost(1, 1), None, most=60, step_seconds=300)
    assert str(found).startswith("saves every step (1.00 s)")


def told(*events) -> list[dict[str, object]]:
    """Records of events at minutes: ("started", 0), ("saved", 10), ..."""
    return [
        {"event": event, "at": f"2026-01-31T{minute // 60:02}:{minute % 60:02}:00+00:00", **more}
        for event, minute, *rest in events
        for more in [rest[0] if rest else {}]
    ]


KILLED = {"previous_owner": "host a, process 1"}
HISTORIES = {
    "one clean start": (told(("started", 0), ("saved", 30)), 30, 0),
    "a kill": (told(("started", 0), ("saved", 30), ("started", 50, KILLED), ("saved", 60)), 40, 1),
    "a stop that was asked for": (told(("started", 0), ("stopped", 30), ("started", 50)), 30, 0),
    "an error": (told(("started", 0), ("saved", 20), ("failed", 30), ("started", 50)), 30, 1),
    "an error and a kill": (told(("started", 0), ("failed", 30), ("started", 50, KILLED)), 30, 1),
    "an error that nobody followed": (told(("started", 0), ("failed", 30)), 30, 0),
    "a clock that was set back": (told(("started", 30), ("saved", 10), ("started", 50)), 0, 0),
    "starts without dates": ([{"event": "started"}, {"event": "started", **KILLED}], 0, 0),
    "a date that is none": ([{"event": "started", "at": "noon"}], 0, 0),
    "another's lock at the first start": (told(("started", 0, KILLED), ("saved", 5)), 5, 0),
}  # fmt: skip


@pytest.mark.parametrize(("history", "minutes", "failures"), HISTORIES.values(), ids=HISTORIES)
def test_a_history_tells_how_long_the_run_ran_and_how_often_it_failed(history, minutes, failures):
    assert Observed.of(history) == Observed(minutes * 60.0, failures)


def test_one_observed_failure_outweighs_what_is_assumed():
    assert Observed(HOUR, 0).rate(1, 0).source == "assumed"
    assert Observed(HOUR, 1).rate(1, HOUR) == FailureRate(2 * HOUR, "observed", 1)


def test_a_run_that_fails_at_once_is_not_saved_all_the_time():
    assert Observed(0, 20).rate(1, 0).seconds == 60


@pytest.mark.parametrize("cadence", [None, 3, {}, {"cost": None}])
def test_a_history_that_tells_no_cost_gives_none(cadence):
    assert UsualCost.last_of([{"event": "saved"}, {"event": "saved", "cadence": cadence}]) is None
