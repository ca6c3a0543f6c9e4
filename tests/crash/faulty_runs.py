"""Scenarios on a faulty disk."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crash.save_scenarios import SCENARIOS, Scenario
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


class LeavesOut(FaultyStorage):
    """A disk that reports a sync as done and leaves it out: a writer that forgot it."""

    def __init__(self, is_left_out: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_left_out = is_left_out

    def sync(self, file, path):
        if not self._is_left_out(path):
            super().sync(file, path)

    def sync_folder(self, path):
        if not self._is_left_out(path or "the run directory"):
            super().sync_folder(path)
