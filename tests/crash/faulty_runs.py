"""Scenarios on a faulty disk."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crash.saving import SCENARIOS, Scenario
from unbroken.testing import FaultyStorage

EACH_SCENARIO = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))

Disk = Callable[[], FaultyStorage]


def prepared(scenario: Scenario, disk: Disk = FaultyStorage) -> FaultyStorage:
    storage = disk()
    scenario.prepare(storage)
    return storage


def steps_of(scenario: Scenario, disk: Disk = FaultyStorage) -> int:
    """How many durable steps the scenario takes when nothing goes wrong."""
    storage = prepared(scenario, disk)
    storage.arm()
    scenario.act(storage, lambda: None)
    return storage.steps
