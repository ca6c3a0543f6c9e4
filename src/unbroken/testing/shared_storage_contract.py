"""What a storage that several processes share must do besides: locks and renames between them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from unbroken.errors import LockHeldError
from unbroken.storage import Lock, Storage
from unbroken.testing.storage_contract import StorageContract, get, put


class SharedStorageContract(StorageContract):
    """The contract of a storage that several processes use at once.

    Give the fixture `open_again`, which returns a function that opens the same place anew; the
    suite calls it in forked children too.
    """

    @pytest.fixture
    def open_again(self, storage: Storage) -> Callable[[], Storage]:
        pytest.fail("give a fixture `open_again` that returns how to open it anew")

    @pytest.fixture
    def storage(self, open_again: Callable[[], Storage]) -> Storage:
        return open_again()

    def test_what_one_writes_another_sees(self, open_again: Callable[[], Storage]) -> None:
        put(open_again(), "a", b"shared")
        assert get(open_again(), "a") == b"shared"

    def test_a_lock_held_in_this_process_is_refused_here_too(
        self, open_again: Callable[[], Storage]
    ) -> None:
        lock = open_again().lock("run.lock", "this process")
        with pytest.raises(LockHeldError, match="this process"):
            open_again().lock("run.lock", "again")
        lock.release()

    def test_a_lock_held_by_a_live_process_is_refused_elsewhere(
        self, open_again: Callable[[], Storage]
    ) -> None:
        lock = open_again().lock("run.lock", "the parent")
        assert exit_code_of(lambda: take_or_exit(open_again(), "the parent")) == REFUSED
        lock.release()
        assert exit_code_of(lambda: take_or_exit(open_again(), "the parent")) == TAKEN

    def test_a_lock_whose_owner_was_killed_is_taken_and_tells_who_it_was(
        self, open_again: Callable[[], Storage]
    ) -> None:
        assert exit_code_of(lambda: take_and_die(open_again(), "the dead")) == -signal.SIGKILL
        lock = open_again().lock("run.lock", "the next")
        assert lock.previous_owner == "the dead"
        lock.release()

    def test_a_lock_is_not_kept_alive_by_children_of_its_owner(
        self, open_again: Callable[[], Storage]
    ) -> None:
        release, hold = os.pipe()  # the grandchild lives until `hold` is closed everywhere
        owner = lambda: take_fork_and_die(open_again(), release, hold)  # noqa: E731
        assert exit_code_of(owner) == -signal.SIGKILL
        lock = open_again().lock("run.lock", "the next")
        assert lock.previous_owner == "the owner"
        lock.release()
        os.close(hold)
        os.close(release)

    def test_a_child_that_releases_its_copy_leaves_the_lock_to_its_parent(
        self, open_again: Callable[[], Storage]
    ) -> None:
        lock = open_again().lock("run.lock", "the parent")
        assert exit_code_of(lock.release) == 0
        assert exit_code_of(lambda: take_or_exit(open_again(), "the parent")) == REFUSED
        lock.release()

    def test_a_lock_survives_that_its_file_is_opened_and_closed(
        self, open_again: Callable[[], Storage]
    ) -> None:
        lock = open_again().lock("run.lock", "the parent")
        assert get(open_again(), "run.lock") == b"the parent"
        assert exit_code_of(lambda: take_or_exit(open_again(), "the parent")) == REFUSED
        lock.require_held()
        lock.release()

    def test_a_forked_child_does_not_hold_the_lock_of_its_parent(
        self, open_again: Callable[[], Storage]
    ) -> None:
        lock = open_again().lock("run.lock", "the parent")
        assert exit_code_of(lambda: is_held(lock)) == REFUSED
        assert is_held(lock) == TAKEN
        lock.release()

    def test_of_two_renames_to_one_name_one_wins(self, open_again: Callable[[], Storage]) -> None:
        storage = open_again()
        for number in range(20):
            for name in ("mine", "theirs"):
                storage.make_folder(f"{name}-{number}")
        child = fork(lambda: rename_all(open_again(), "theirs"))
        wins = rename_all(storage, "mine")
        assert wins + wait(child) == 20


TAKEN, REFUSED, WRONG = 0, 3, 4


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a forked child, which then exits at once with what it returned, or 0."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            result = work()
            code = result if isinstance(result, int) else 0
        finally:
            os._exit(code)
    return child


def wait(child: int) -> int:
    """Return the exit code of a child; minus the signal if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def exit_code_of(work: Callable[[], object]) -> int:
    """Run `work` in a forked child and return its exit code."""
    return wait(fork(work))


def take_or_exit(storage: Storage, owner: str) -> int:
    """Try to take the lock; say by a number how it went."""
    try:
        storage.lock("run.lock", "a child").release()
    except LockHeldError as error:
        return REFUSED if owner in str(error) else WRONG
    return TAKEN


def is_held(lock: Lock) -> int:
    """Say by a number whether this process holds a lock."""
    try:
        lock.require_held()
    except LockHeldError:
        return REFUSED
    return TAKEN


def take_and_die(storage: Storage, owner: str) -> None:
    """Take the lock and be killed while holding it."""
    storage.lock("run.lock", owner)
    os.kill(os.getpid(), signal.SIGKILL)


def take_fork_and_die(storage: Storage, release: int, hold: int) -> None:
    """Take the lock, leave a child that lives on, and be killed."""
    storage.lock("run.lock", "the owner")
    if os.fork() == 0:
        os.close(hold)
        os.read(release, 1)  # until the test closes its end
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def rename_all(storage: Storage, name: str) -> int:
    """Rename twenty folders to names that another process wants too; return how many it got."""
    wins = 0
    for number in range(20):
        try:
            storage.rename(f"{name}-{number}", f"won-{number}")
        except FileExistsError:
            continue
        wins += 1
    return wins
