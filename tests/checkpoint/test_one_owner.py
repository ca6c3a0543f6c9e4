"""A run directory has one owner, whatever is done to its lock, and only the owner commits."""

from __future__ import annotations

import os
import shutil
import tarfile

import pytest
from torch import nn

from small_trainers import steps_in
from unbroken.checkpoint import Checkpointer
from unbroken.errors import LockHeldError, RunDirectoryError
from unbroken.storage import file_lock


def checkpointer(folder) -> Checkpointer:
    made = Checkpointer(folder, model=nn.Linear(2, 2))
    made.resume()
    return made


def in_child(work) -> int:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work() or 0
        except LockHeldError:
            code = LockHeldError.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_again(folder) -> int:
    """Try to begin in a fresh process, which has taken nothing along from this one."""
    return in_child(lambda: checkpointer(folder).close())


def by_copying(run, elsewhere):
    shutil.copytree(run, elsewhere)


def by_packing(run, elsewhere):
    with tarfile.open(elsewhere, "w") as archive:
        archive.add(run)


def by_reading(run, elsewhere):
    (run / "run.lock").read_bytes()


@pytest.mark.parametrize("touch", [by_copying, by_packing, by_reading])
def test_a_run_keeps_its_lock_when_its_directory_is_read(touch, tmp_path):
    owner = checkpointer(tmp_path / "run")
    touch(tmp_path / "run", tmp_path / "elsewhere")
    assert start_again(tmp_path / "run") == LockHeldError.exit_code
    owner.save(1)
    owner.close()
    assert start_again(tmp_path / "run") == 0


def test_where_reading_loses_the_lock_the_first_owner_commits_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(file_lock, "_HAS_OFD_LOCKS", False)  # as on other systems than Linux
    first = checkpointer(tmp_path)
    by_reading(tmp_path, None)
    assert in_child(lambda: checkpointer(tmp_path).save(1) and None) == 0  # the second, killed
    with pytest.raises(LockHeldError, match=r"does not belong to this process any more.*host"):
        first.save(2)
    assert steps_in(tmp_path) == [1]


def replaced(lock):
    lock.rename(lock.with_name("moved"))
    lock.write_text("another owner")


def written_over(lock):
    lock.write_text("another owner")


@pytest.mark.parametrize("harm", [replaced, written_over])
def test_a_run_that_has_lost_its_lock_commits_nothing_more(harm, tmp_path):
    owner = checkpointer(tmp_path)
    owner.save(1)
    harm(tmp_path / "run.lock")
    with pytest.raises(LockHeldError, match=r"does not belong to this process any more.*another"):
        owner.save(2)
    assert steps_in(tmp_path) == [1]
    assert [*(tmp_path / ".staging").iterdir()] == []


def test_a_lock_that_is_lost_while_a_checkpoint_is_written_is_seen_at_the_commit(
    tmp_path, monkeypatch
):
    owner = checkpointer(tmp_path)
    metrics = owner.run.metrics
    sync = metrics.sync

    def sync_and_lose() -> None:
        sync()
        written_over(tmp_path / "run.lock")

    monkeypatch.setattr(metrics, "sync", sync_and_lose)
    with pytest.raises(LockHeldError):
        owner.save(1)
    assert steps_in(tmp_path) == []


def test_a_lock_that_was_removed_by_hand_is_taken_again(tmp_path):
    owner = checkpointer(tmp_path)
    (tmp_path / "run.lock").unlink()
    owner.save(1)
    assert start_again(tmp_path) == LockHeldError.exit_code
    owner.close()
    assert start_again(tmp_path) == 0


def test_the_next_owner_of_a_lock_removed_by_hand_is_the_only_one(tmp_path):
    first = checkpointer(tmp_path)
    (tmp_path / "run.lock").unlink()
    release, hold = os.pipe()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hold)
        other = checkpointer(tmp_path)
        other.save(5)
        os.write(tell, b"1")
        os.read(release, 1)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(LockHeldError):
        first.save(2)
    os.close(hold)
    os.waitpid(child, 0)
    assert steps_in(tmp_path) == [5]


def test_a_forked_child_cannot_save_and_its_parent_can(tmp_path):
    owner = checkpointer(tmp_path)
    assert in_child(lambda: owner.save(1) and None) == LockHeldError.exit_code
    assert steps_in(tmp_path) == []
    owner.save(2)
    assert steps_in(tmp_path) == [2]


def test_who_only_looks_removes_nothing(tmp_path):
    checkpointer(tmp_path).close()
    run = checkpointer(tmp_path).run.open_readonly(tmp_path)
    with pytest.raises(RunDirectoryError, match="reading only"):
        run.require_ownership()
