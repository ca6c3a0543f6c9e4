"""Kills and power cuts at every durable step of making a branch, on a disk in memory."""

from __future__ import annotations

from itertools import count

import pytest

from crash.faulty_runs import Disk, LeavesOut
from store.branched_runs import NAME, child_of, content_of, make_branch, make_parent
from unbroken.errors import RunDirectoryError, SaveError, UnbrokenError
from unbroken.testing import POWER_CUT_MODES, FaultyStorage, PowerCut

SEEDS = {"some": range(3)}


@pytest.fixture(scope="module")
def expected():
    """What a branch holds that was made in peace."""
    storage = prepared()
    make_branch(storage).close()
    return content_of(child_of(storage))


@pytest.fixture(scope="module")
def parent():
    return content_of(prepared())


def prepared(disk: Disk = FaultyStorage) -> FaultyStorage:
    storage = disk()
    make_parent(storage)
    storage.arm()
    return storage


def disks_after(storage: FaultyStorage) -> dict[str, FaultyStorage]:
    """Every disk that the next start may find."""
    disks = {"kill": storage.after_kill()}
    for mode in POWER_CUT_MODES:
        for seed in SEEDS.get(mode, [0]):
            disks[f"{mode} {seed}"] = storage.after_power_cut(mode, seed)
    return disks


def cuts(disk: Disk):
    """Yield a disk cut at each step of making a branch, as the cut process leaves it."""
    for step in count(1):
        storage = disk()
        storage.arm(cut_at=step)
        try:
            make_branch(storage).close()
        except PowerCut:
            yield storage
        else:
            return


def check(storage: FaultyStorage, expected: dict, parent: dict) -> None:
    """The parent is as it was; the branch is whole or not there; the same call makes it whole."""
    assert content_of(storage) == parent
    if storage.stat(f"branches/{NAME}") is not None:
        assert content_of(child_of(storage)) == expected
    make_branch(storage).close()
    for disk in (storage, storage.after_power_cut("forget"), storage.after_power_cut("zeros")):
        assert content_of(child_of(disk)) == expected
    assert content_of(storage) == parent


def sweep(expected: dict, parent: dict, disk: Disk = FaultyStorage) -> int:
    storages = list(cuts(lambda: prepared(disk)))
    for storage in storages:
        for name, after in disks_after(storage).items():
            try:
                check(after, expected, parent)
            except AssertionError as error:
                error.add_note(f"after {name} at step {storage.steps}: {storage.log[-1]}")
                raise
    return len(storages)


def test_after_any_cut_there_is_a_whole_branch_or_none_and_the_same_call_makes_it(expected, parent):
    assert sweep(expected, parent) > 30


def test_after_a_kill_the_same_call_leaves_nothing_of_the_first_attempt():
    for storage in cuts(prepared):
        after = storage.after_kill()
        make_branch(after).close()
        assert after.list("branches/.staging") == []


def test_a_second_cut_while_the_same_call_clears_up_changes_nothing(expected, parent):
    for storage in list(cuts(prepared))[::5]:
        for again in cuts(storage.after_kill):
            check(again.after_power_cut("forget"), expected, parent)


def test_a_branch_that_was_returned_survives_a_power_cut(expected):
    storage = prepared()
    make_branch(storage).close()
    for disk in disks_after(storage).values():
        assert content_of(child_of(disk)) == expected


def test_a_cut_attempt_for_one_step_does_not_reach_into_a_branch_of_another(parent):
    for storage in cuts(prepared):
        after = storage.after_kill()
        if after.stat(f"branches/{NAME}") is None:
            with make_branch(after, 30) as child:
                assert [step for step, _ in child.catalog.folders()] == [10, 30]
            assert content_of(after) == parent


@pytest.mark.parametrize("lasting", [True, False], ids=["full disk", "one failure"])
def test_a_failing_disk_leaves_no_half_branch_and_the_same_call_makes_it(expected, parent, lasting):
    whole = prepared()
    make_branch(whole).close()
    for step in range(1, whole.steps + 1):
        storage = prepared()
        storage.arm(fail_at=step, lasting=lasting)
        with pytest.raises((RunDirectoryError, SaveError), match="Input/output error"):
            make_branch(storage)
        storage.repair()
        check(storage.after_kill(), expected, parent)


# Controls: a maker that forgets one sync is caught.

SITE = f"branches/.staging/{NAME}"


@pytest.mark.parametrize(
    "left_out",
    [
        SITE,
        f"{SITE}/checkpoint-20",
        f"{SITE}/metrics.jsonl",
        f"{SITE}/run.json.new",
    ],
)
def test_a_maker_that_leaves_out_one_sync_is_caught(expected, parent, left_out):
    with pytest.raises((AssertionError, UnbrokenError)):
        sweep(expected, parent, lambda: LeavesOut(lambda path: path == left_out))


def test_a_maker_that_does_not_sync_the_new_name_loses_a_branch_that_was_returned():
    storage = prepared(lambda: LeavesOut(lambda path: path == "branches"))
    make_branch(storage).close()
    assert storage.after_power_cut("forget").stat(f"branches/{NAME}") is None


def test_the_same_disk_with_no_sync_left_out_is_clean(expected, parent):
    sweep(expected, parent, lambda: LeavesOut(lambda path: False))
