"""The same cuts over a storage that compresses: the newest checkpoint is the old or the new one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crash.faulty_runs import Disk, LeavesOut
from crash.oracle import check_after_cut
from crash.save_scenarios import SCENARIOS, Scenario
from crash.test_cut_at_every_step import is_renamed
from unbroken.storage import CompressedStorage
from unbroken.testing import POWER_CUT_MODES, FaultyStorage, PowerCut

NAMES = ["a save over an older one", "a save and then retention", "the same save again"]


def compressed(storage: FaultyStorage) -> CompressedStorage:
    return CompressedStorage(storage, least_bytes=1)


def prepared(scenario: Scenario, disk: Disk) -> FaultyStorage:
    storage = disk()
    scenario.prepare(compressed(storage))
    storage.arm()
    return storage


def sweep(scenario: Scenario, disk: Disk = FaultyStorage) -> int:
    whole = prepared(scenario, disk)
    scenario.act(compressed(whole), lambda: None)
    for step in range(1, whole.steps + 1):
        storage, saved = prepared(scenario, disk), []
        storage.arm(cut_at=step)
        with pytest.raises(PowerCut):
            scenario.act(compressed(storage), lambda saved=saved: saved.append(True))
        may_be_new, must_be_new = bool(saved) or is_renamed(storage, scenario), bool(saved)
        for after in (storage.after_kill(), *map(storage.after_power_cut, POWER_CUT_MODES)):
            check_after_cut(
                compressed(after), scenario, may_be_new=may_be_new, must_be_new=must_be_new
            )
    return whole.steps


@pytest.mark.parametrize("name", NAMES)
def test_after_any_cut_the_newest_checkpoint_is_the_old_or_the_new_one(name):
    assert sweep(SCENARIOS[name]) > 20


def test_a_run_may_hold_plain_checkpoints_from_before():
    scenario = SCENARIOS["a save over an older one"]
    plain = replace(scenario, prepare=lambda storage: scenario.prepare(storage._inner))
    assert sweep(plain) > 20


def test_a_compressed_file_that_is_not_synced_is_caught():
    with pytest.raises(AssertionError):
        sweep(
            SCENARIOS[NAMES[0]],
            lambda: LeavesOut(lambda path: path.endswith("l.safetensors.planes")),
        )
