"""How often to save: formula and simulation agree, and the best interval is the best."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbroken.errors import ConfigError
from unbroken.goodput import PUBLISHED_FAILURES, Rhythm, best_interval
from unbroken.planner import Cluster, simulate

RHYTHMS = {
    "failures are rare": Rhythm(458, 10, 0, 300, 10_800),
    "saves overlap": Rhythm(300, 0.5, 120, 300, 10_800),
    "a start is often broken off": Rhythm(200, 20, 60, 900, 1_200),
    "saves are slower than training": Rhythm(60, 240, 0, 30, 2_000),
}


@pytest.mark.parametrize("rhythm", RHYTHMS.values(), ids=RHYTHMS)
def test_the_simulation_agrees_with_the_formula(rhythm):
    found = simulate(rhythm, random.Random(1))
    assert abs(found.goodput - rhythm.goodput) < 3 * found.error
    assert found.error < 0.02 * rhythm.goodput


@pytest.mark.parametrize("forgotten", ["lost", "until_durable", "restart"])
def test_the_simulation_sees_each_of_the_costs(forgotten):
    costs = {"lost": 20.0, "until_durable": 120.0, "restart": 300.0}
    without = Rhythm(300, **(costs | {forgotten: 0.0}), between_failures=5_000)
    found = simulate(Rhythm(300, **costs, between_failures=5_000), random.Random(1))
    assert abs(found.goodput - without.goodput) > 3 * found.error


@given(lost=st.floats(0.01, 1e4), mean=st.floats(1.0, 1e7), factor=st.floats(0.2, 5.0))
def test_no_interval_is_better_than_the_best(lost, mean, factor):
    best = best_interval(lost, mean)
    other = Rhythm(best * factor, lost, 0, 0, mean).goodput
    assert other <= Rhythm(best, lost, 0, 0, mean).goodput * (1 + 1e-9)


def test_for_quick_saves_the_best_interval_is_youngs():
    assert best_interval(1.0, 1e6) == pytest.approx(math.sqrt(2 * 1.0 * 1e6), rel=1e-3)


def test_all_parts_of_the_time_make_a_whole():
    rhythm = Rhythm(300, 20, 120, 300, 5_000)
    parts = (rhythm.goodput, rhythm.saving, rhythm.starting, rhythm.repeated)
    assert sum(parts) == pytest.approx(1)
    assert min(parts) > 0


def test_the_published_failures_are_one_in_three_hours():
    cluster = Cluster(PUBLISHED_FAILURES.gpus, 405e9, 2e12)
    assert cluster.between_failures == pytest.approx(54 * 24 * 3600 / 419)


def test_a_save_is_durable_before_the_next_one_begins():
    cluster = Cluster(gpus=8, parameters=8e9, bandwidth=1e7, lost=0.1)
    assert cluster.rhythm().interval == pytest.approx(cluster.transfer)


BAD = {
    "no interval": lambda: Rhythm(0, 1, 1, 1, 100),
    "negative loss": lambda: Rhythm(10, -1, 1, 1, 100),
    "endless start": lambda: Rhythm(10, 1, 1, math.inf, 100),
    "no time between failures": lambda: best_interval(1, 0),
    "no number": lambda: best_interval(math.nan, 1),
    "no GPUs": lambda: Cluster(0, 1e9, 1e9),
    "no bandwidth": lambda: Cluster(8, 1e9, 0),
    "negative seconds to start": lambda: Cluster(8, 1e9, 1e9, starting=-1),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_impossible_numbers_are_refused(make):
    with pytest.raises(ConfigError, match=r"expected|must be|cannot be"):
        make()
