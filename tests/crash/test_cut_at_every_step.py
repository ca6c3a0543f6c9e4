"""Kills and power cuts at every durable step of every scenario, on a disk in memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from crash.faulty_runs import EACH_SCENARIO, Disk, LeavesOut, prepared, steps_of
from crash.oracle import check_after_cut
from crash.save_scenarios import SCENARIOS, Scenario
from store.small_runs import open_run
from unbroken.testing import POWER_CUT_MODES, FaultyStorage, PowerCut

SEEDS = {"some": range(5)}


def cut(scenario: Scenario, step: int, disk: Disk = FaultyStorage) -> tuple[FaultyStorage, bool]:
    """Cut the scenario at a step; return the disk, and whether the save had returned."""
    storage = prepared(scenario, disk)
    storage.arm(cut_at=step)
    saved: list[bool] = []
    with pytest.raises(PowerCut):
        scenario.act(storage, lambda: saved.append(True))
    return storage, bool(saved)


def is_renamed(storage: FaultyStorage, scenario: Scenario) -> bool:
    """Whether the renaming of the staging folder lies behind the cut."""
    commits = [
        line.startswith("rename .staging/") and line.endswith(f" checkpoint-{scenario.step}")
        for line in storage.log[:-1]  # the last one was cut
    ]
    return any(commits)


def check_all_disks(storage: FaultyStorage, scenario: Scenario, *, saved: bool) -> None:
    disks = {"kill": storage.after_kill()}
    for mode in POWER_CUT_MODES:
        for seed in SEEDS.get(mode, [0]):
            disks[f"{mode} {seed}"] = storage.after_power_cut(mode, seed)
    may_be_new = saved or is_renamed(storage, scenario)
    for name, disk in disks.items():
        try:
            check_after_cut(disk, scenario, may_be_new=may_be_new, must_be_new=saved)
        except AssertionError as error:
            error.add_note(f"after {name} at step {storage.steps}: {storage.log[-1]}")
            raise


def sweep(scenario: Scenario, disk: Disk = FaultyStorage) -> None:
    for step in range(1, steps_of(scenario, disk) + 1):
        storage, saved = cut(scenario, step, disk)
        check_all_disks(storage, scenario, saved=saved)


@EACH_SCENARIO
def test_after_any_cut_the_newest_checkpoint_is_the_old_or_the_new_one(scenario):
    sweep(scenario)


@EACH_SCENARIO
def test_a_save_that_returned_survives_a_power_cut(scenario):
    storage = prepared(scenario)
    scenario.act(storage, lambda: None)
    for mode in POWER_CUT_MODES:
        disk = storage.after_power_cut(mode)
        check_after_cut(disk, scenario, may_be_new=True, must_be_new=True)


@EACH_SCENARIO
def test_a_second_cut_while_the_next_start_sweeps_loses_nothing(scenario):
    for step in range(1, steps_of(scenario) + 1):
        storage, saved = cut(scenario, step)
        may_be_new = saved or is_renamed(storage, scenario)
        for disk in (storage.after_kill, lambda disk=storage: disk.after_power_cut("forget")):
            for after in disks_after_a_cut_start(disk):
                check_after_cut(after, scenario, may_be_new=may_be_new, must_be_new=saved)


def disks_after_a_cut_start(disk: Disk) -> Iterator[FaultyStorage]:
    """Cut the next start at each of its steps."""
    for step in count(1):
        storage = disk()
        storage.arm(cut_at=step)
        try:
            open_run(storage).close()
        except PowerCut:
            yield storage.after_kill()
            yield storage.after_power_cut("forget")
        else:
            return


@pytest.mark.parametrize(
    "is_left_out",
    [
        pytest.param(lambda path: path.endswith("model.safetensors"), id="a tensor file"),
        pytest.param(lambda path: path.endswith("state.json"), id="a plain file"),
        pytest.param(lambda path: path.endswith("manifest.json"), id="the manifest"),
        pytest.param(
            lambda path: path.startswith(".staging/checkpoint-2"), id="the staging folder"
        ),
        pytest.param(lambda path: path == "the run directory", id="the run directory"),
    ],
)
def test_a_writer_that_leaves_out_one_sync_is_caught(is_left_out):
    scenario = SCENARIOS["a save over an older one"]
    with pytest.raises(AssertionError):
        sweep(scenario, lambda: LeavesOut(is_left_out))


def test_the_same_disk_with_no_sync_left_out_is_clean():
    sweep(SCENARIOS["a save over an older one"], lambda: LeavesOut(lambda path: False))


def test_setting_aside_without_syncing_the_new_name_is_caught():
    scenario = SCENARIOS["a save in place of the only checkpoint"]
    with pytest.raises(AssertionError):
        sweep(scenario, lambda: LeavesOut(lambda path: path == "set-aside"))
