"""save_steps="auto" and max_lost_minutes: when saves come, and that no bit depends on it."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from clocks import Jumping
from fresh import run_fresh
from small_trainers import bits, small_trainer, steps_in
from unbroken.checkpoint import Checkpointer, SaveCost, SavePolicy
from unbroken.checkpoint import Clock as Clocks
from unbroken.checkpoint.cadence import LeastLost
from unbroken.errors import ConfigError, SaveError
from unbroken.goodput import FailureRate, Rhythm, SaveInterval, UsualCost
from unbroken.storage import MemoryStorage
from unbroken.training import Callback

HOUR = 3600.0
QUICK = SaveCost(blocked=0.05, durable=0.05)


class Clock:
    """Seconds that only the test moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def best(lost: float, mean: float) -> float:
    return SaveInterval.best(UsualCost(lost, lost), FailureRate(mean, "given")).seconds


def timer(clock, *, mean: float | None = HOUR, most: float | None = None) -> LeastLost:
    given = None if mean is None else FailureRate(mean, "given")
    return LeastLost(ranks=1, given=given, most=most, clock=clock)


def after(*costs: SaveCost) -> float:
    """Return the interval after saves that took so long."""
    found = timer(Clock())
    return [found.interval(cost).seconds for cost in costs][-1]


def test_the_interval_follows_what_a_save_costs():
    assert after(QUICK) == best(0.05, HOUR)
    assert after(SaveCost(2.0, 2.0)) == best(2.0, HOUR)


def test_what_goes_on_beside_the_training_counts_as_lost():
    assert after(SaveCost(0.01, 3.0, computing=1.0)) == best(1.01, HOUR)


def test_the_first_save_of_a_process_does_not_count_once_there_is_another():
    assert after(SaveCost(20, 20)) == best(20, HOUR)
    assert after(SaveCost(20, 20), QUICK) == best(0.05, HOUR)
    assert after(QUICK, SaveCost(2, 2)) == best(2, HOUR)


def test_one_slow_save_among_many_does_not_count():
    costs = [SaveCost(0.05, 0.05) for _ in range(6)]
    assert after(*costs[:4], SaveCost(30, 30), *costs[4:]) == best(0.05, HOUR)


def test_a_disk_that_becomes_slow_is_followed():
    slow = [SaveCost(4, 4) for _ in range(7)]
    assert after(*[SaveCost(0.05, 0.05) for _ in range(50)], *slow) == best(4, HOUR)


def test_a_save_is_due_when_the_interval_is_over():
    clock = Clock()
    found = timer(clock)
    clock.now = best(0.05, HOUR) - 0.01
    assert not found.due(100, QUICK)
    clock.now += 0.02
    assert found.due(101, QUICK)


def test_before_a_limit_is_reached_the_next_step_and_the_save_are_counted_in():
    clock = Clock()
    found = timer(clock, mean=None, most=600.0)
    found.interval(SaveCost(10, 50))
    asked = []
    for step in range(1, 20):
        clock.now += 60
        asked.append(found.due(step, None))
    assert asked.index(True) + 1 == 9  # 540 s, and 50 s to save: one step more were too many


def test_under_a_limit_the_slowest_of_the_last_saves_counts():
    found = timer(Clock(), mean=1e9, most=600.0)
    for durable in (5, 50, 10, 10, 10):
        interval = found.interval(SaveCost(1, durable))
    assert interval.seconds == 550


def date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def play(mean: float, cost: float, steps: int) -> float:
    """Train under failures that nobody told of; return the part of the time that was kept."""
    rng, clock, history, kept = random.Random(0), Clock(), [], 0
    while kept < steps:
        fails_at = clock.now + rng.expovariate(1 / mean)
        owner = {"previous_owner": "dead"} if history else {}
        history.append({"event": "started", "at": date(clock.now), **owner})
        found, step, last = timer(clock, mean=None), kept, None
        found.begin(step, history)
        while clock.now < fails_at:
            clock.now, step = clock.now + 1, step + 1
            if found.due(step, last):
                clock.now += cost
                kept, last = step, SaveCost(cost, cost)
                cadence = found.interval(last).to_json()
                history.append({"event": "saved", "at": date(clock.now), "cadence": cadence})
                found.done(step)
    return kept / clock.now


@pytest.mark.parametrize(("mean", "cost"), [(1200.0, 2.0), (HOUR, 20.0), (3 * HOUR, 1.0)])
def test_a_run_that_has_to_learn_how_often_it_fails_keeps_almost_as_much_as_the_best(mean, cost):
    reached = play(mean, cost, steps=int(60 * mean))
    best_possible = Rhythm(best(cost, mean), cost, 0, 0, mean).goodput
    assert reached == pytest.approx(best_possible, abs=0.02)


def opened(storage, wall_clock=time.time, save_steps="auto", **policy) -> Checkpointer:
    settings = {"clock": Clocks(Clock(), wall_clock), "save": SavePolicy(save_steps, **policy)}
    return Checkpointer(storage, weight=torch.zeros(2), **settings)


def fail_after(storage, wall, seconds: float) -> None:
    with opened(storage, wall_clock=wall) as checkpointer:
        checkpointer.resume()
        wall.now += seconds
        raise ZeroDivisionError


def test_a_start_after_an_error_knows_how_often_the_run_fails():
    storage, wall = MemoryStorage(), Clock()
    with pytest.raises(ZeroDivisionError):
        fail_after(storage, wall, 2 * HOUR)
    with opened(storage, wall_clock=wall) as second:
        second.resume()
        assert second.save_interval.failures == FailureRate(2 * HOUR, "observed", 1)


class Kill(Callback):
    def on_step_end(self, trainer):
        if trainer.progress.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(folder: str) -> None:
    small_trainer(Path(folder), save_steps="auto", trainer={"callbacks": [Kill()]}).train()


def test_a_start_after_a_real_kill_knows_that_the_run_failed(tmp_path):
    assert run_fresh(train_until_killed, str(tmp_path)) == -signal.SIGKILL
    trainer = small_trainer(tmp_path, save_steps="auto", trainer={"callbacks": [Kill()]})
    with trainer.checkpointer:
        trainer.load_checkpoint()
        assert trainer.checkpointer.save_interval.failures.source == "observed"
        assert trainer.checkpointer.save_interval.failures.count == 1


@pytest.mark.parametrize("end", [None, SystemExit(75)])
def test_a_start_after_a_clean_end_does_not(end):
    storage = MemoryStorage()
    with opened(storage) as first:
        first.resume()
        first.__exit__(type(end), end, None)
    with opened(storage) as second:
        second.resume()
        assert second.save_interval.failures.source == "assumed"


def test_what_a_save_costs_is_known_to_the_next_start():
    storage = MemoryStorage()
    with opened(storage) as first:
        first.resume()
        first.save(1)
        first.save(2)
        known = first.save_interval.cost
    with opened(storage) as second:
        second.resume()
        assert second.save_interval.cost is not None
        assert known is not None


def fail_on_a_full_disk() -> None:
    with opened(MemoryStorage()) as checkpointer:
        checkpointer.resume()
        checkpointer.run.history = FullJournal()
        raise ZeroDivisionError


class FullJournal:
    def append(self, record):
        raise SaveError("history.jsonl", "no space left on device")


def test_a_full_disk_does_not_hide_the_error_that_ends_the_run():
    with pytest.raises(ZeroDivisionError):
        fail_on_a_full_disk()


BAD = {
    "another word": {"save_steps": "often"},
    "no minutes": {"max_lost_minutes": 0},
    "no number of hours": {"mtbf_hours": float("nan")},
    "endless hours": {"mtbf_hours": float("inf")},
    "a limit that is none": {"max_lost_minutes": float("inf")},
    "half a step": {"save_steps": 2.5},
    "yes": {"save_steps": True},
    "hours without auto": {"save_steps": 5, "mtbf_hours": 3},
}


@pytest.mark.parametrize("settings", BAD.values(), ids=BAD)
def test_settings_that_make_no_sense_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=list(settings)[-1]):
        opened(MemoryStorage(), **settings)


def trained(folder, seed: int, **settings):
    auto = {"save_steps": "auto", "mtbf_hours": 1e6, "max_lost_minutes": 2, "max_steps": 12}
    settings = {"lr_scheduler_type": "constant", **auto, **settings}
    trainer = small_trainer(folder, trainer={"clock": Jumping(seed)}, **settings)
    trainer.train()
    return trainer


def test_saves_come_at_other_steps_under_another_clock_and_the_bits_are_the_same(tmp_path):
    one, other = trained(tmp_path / "a", seed=1), trained(tmp_path / "b", seed=2)
    assert steps_in(tmp_path / "a") != steps_in(tmp_path / "b")
    assert bits(one.model) == bits(other.model)


def test_another_learning_rate_would_give_other_bits(tmp_path):
    one = trained(tmp_path / "a", seed=1)
    assert bits(one.model) != bits(trained(tmp_path / "b", seed=1, learning_rate=0.02).model)


def test_a_run_goes_on_exactly_from_wherever_its_saves_were(tmp_path):
    whole = trained(tmp_path / "whole", seed=1)
    trained(tmp_path / "parts", seed=3, max_steps=7)
    assert bits(trained(tmp_path / "parts", seed=4).model) == bits(whole.model)
