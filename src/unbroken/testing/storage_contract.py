"""What every storage must do, as a test suite that yours can run too.

Put it into a test file of your project, and give it your storage:

    import pytest
    from unbroken.testing import StorageContract

    class TestMyStorage(StorageContract):
        @pytest.fixture
        def storage(self):
            return MyStorage(...)        # a new, empty one for each test

A storage that several processes may use at once (a disk, a network mount) takes
`SharedStorageContract` instead, which asks for the locks between processes as well.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from unbroken.errors import LockHeldError
from unbroken.storage import Lock, Storage


def put(storage: Storage, path: str, data: bytes) -> None:
    """Create a file that holds `data`."""
    with storage.create(path) as file:
        file.write(data)
        file.sync()


def get(storage: Storage, path: str) -> bytes:
    """Return the whole content of a file."""
    with storage.open(path) as file:
        buffer = bytearray(file.nbytes)
        file.read_into(0, memoryview(buffer))
    return bytes(buffer)


class StorageContract:
    """Subclass it, name the subclass `Test...`, and give the fixture `storage`."""

    @pytest.fixture
    def storage(self) -> Storage:
        pytest.fail("give a fixture `storage` that returns a new, empty storage")

    # Files

    def test_a_file_holds_what_was_written_in_order(self, storage: Storage) -> None:
        with storage.create("a") as file:
            file.write(b"one ")
            file.write(bytearray(b"two "))
            file.write(memoryview(b"xxthree")[2:])
        assert get(storage, "a") == b"one two three"

    def test_an_empty_write_and_an_empty_file_are_allowed(self, storage: Storage) -> None:
        put(storage, "a", b"")
        assert get(storage, "a") == b""

    def test_a_file_of_many_megabytes_comes_back_whole(self, storage: Storage) -> None:
        data = bytes(range(256)) * (5 << 12)
        put(storage, "a", data)
        assert get(storage, "a") == data

    @pytest.mark.parametrize("announced", [1 << 20, (5 << 20) + 3, 9 << 20])
    def test_a_file_of_announced_length_holds_what_was_written(
        self, storage: Storage, announced: int
    ) -> None:
        data = bytes(range(251)) * ((5 << 20) // 251)
        with storage.create("a", announced) as file:
            for part in (data[:64], data[64:5000], data[5000:]):
                file.write(part)
            file.sync()
            file.write(b"and more")
        assert get(storage, "a") == data + b"and more"

    def test_create_refuses_a_path_that_exists(self, storage: Storage) -> None:
        put(storage, "a", b"first")
        storage.make_folder("folder")
        for path in ("a", "folder"):
            with pytest.raises(FileExistsError):
                storage.create(path)
        assert get(storage, "a") == b"first"

    def test_create_refuses_a_missing_parent(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError):
            storage.create("missing/a")

    def test_create_refuses_a_parent_that_is_a_file(self, storage: Storage) -> None:
        put(storage, "a", b"")
        with pytest.raises(NotADirectoryError):
            storage.create("a/b")

    def test_written_bytes_are_visible_before_sync(self, storage: Storage) -> None:
        with storage.create("a") as file:
            file.write(b"seen")
            assert get(storage, "a") == b"seen"

    def test_a_handle_may_be_closed_twice(self, storage: Storage) -> None:
        file = storage.create("a")
        file.close()
        file.close()
        reader = storage.open("a")
        reader.close()
        reader.close()
        assert storage.list("") == ["a"]

    # Reading

    def test_any_range_can_be_read(self, storage: Storage) -> None:
        put(storage, "a", b"0123456789")
        with storage.open("a") as file:
            assert file.nbytes == 10
            for start in range(11):
                for stop in range(start, 11):
                    buffer = bytearray(stop - start)
                    file.read_into(start, memoryview(buffer))
                    assert buffer == b"0123456789"[start:stop]

    def test_read_into_touches_nothing_but_its_buffer(self, storage: Storage) -> None:
        put(storage, "a", b"0123")
        buffer = bytearray(b"........")
        with storage.open("a") as file:
            file.read_into(1, memoryview(buffer)[2:5])
        assert buffer == b"..123..."

    def test_read_into_fills_a_buffer_of_any_item_type(self, storage: Storage) -> None:
        put(storage, "a", b"\1\0\0\0\2\0\0\0")
        buffer = memoryview(bytearray(8)).cast("i")
        with storage.open("a") as file:
            file.read_into(0, buffer)
        assert buffer.tobytes() == b"\1\0\0\0\2\0\0\0"

    @pytest.mark.parametrize("offset", [0, 1, 4, 100])
    def test_reading_past_the_end_is_an_error(self, storage: Storage, offset: int) -> None:
        put(storage, "a", b"0123")
        with storage.open("a") as file, pytest.raises(EOFError):
            file.read_into(offset, memoryview(bytearray(5)))

    def test_open_refuses_a_missing_file(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError):
            storage.open("missing")

    def test_open_refuses_a_folder(self, storage: Storage) -> None:
        storage.make_folder("folder")
        with pytest.raises(IsADirectoryError):
            storage.open("folder")

    def test_an_open_file_can_be_read_after_its_name_is_gone(self, storage: Storage) -> None:
        put(storage, "a", b"still here")
        buffer = bytearray(10)
        with storage.open("a") as file:
            storage.remove_file("a")
            file.read_into(0, memoryview(buffer))
        assert buffer == b"still here"

    # Append and truncate

    def test_append_creates_and_then_extends(self, storage: Storage) -> None:
        storage.append("a", b"one\n")
        storage.append("a", b"two\n")
        storage.sync_file("a")
        assert get(storage, "a") == b"one\ntwo\n"

    def test_append_refuses_a_missing_parent_and_a_folder(self, storage: Storage) -> None:
        storage.make_folder("folder")
        with pytest.raises(FileNotFoundError):
            storage.append("missing/a", b"")
        with pytest.raises(IsADirectoryError):
            storage.append("folder", b"")

    def test_truncate_keeps_the_beginning(self, storage: Storage) -> None:
        put(storage, "a", b"0123456789")
        storage.truncate("a", 4)
        storage.append("a", b"x")
        assert get(storage, "a") == b"0123x"

    def test_truncate_never_makes_a_file_longer(self, storage: Storage) -> None:
        put(storage, "a", b"0123")
        with pytest.raises(ValueError, match="cannot cut"):
            storage.truncate("a", 5)
        assert get(storage, "a") == b"0123"

    def test_truncate_and_sync_refuse_a_missing_file(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError):
            storage.truncate("missing", 0)
        with pytest.raises(FileNotFoundError):
            storage.sync_file("missing")

    # Folders

    def test_a_listing_is_sorted_and_flat(self, storage: Storage) -> None:
        for name in ("b", "a10", "a2", "A"):
            put(storage, name, b"")
        storage.make_folder("folder")
        put(storage, "folder/inner", b"")
        assert storage.list("") == ["A", "a10", "a2", "b", "folder"]
        assert storage.list("folder") == ["inner"]

    def test_list_refuses_what_is_no_folder(self, storage: Storage) -> None:
        put(storage, "a", b"")
        with pytest.raises(FileNotFoundError):
            storage.list("missing")
        with pytest.raises(NotADirectoryError):
            storage.list("a")

    def test_make_folder_refuses_what_exists_and_a_missing_parent(self, storage: Storage) -> None:
        storage.make_folder("folder")
        for path in ("folder", ""):
            with pytest.raises(FileExistsError):
                storage.make_folder(path)
        with pytest.raises(FileNotFoundError):
            storage.make_folder("missing/folder")

    def test_remove_folder_refuses_one_that_is_not_empty(self, storage: Storage) -> None:
        storage.make_folder("folder")
        put(storage, "folder/a", b"kept")
        with pytest.raises(OSError, match="folder"):
            storage.remove_folder("folder")
        assert get(storage, "folder/a") == b"kept"
        storage.remove_file("folder/a")
        storage.remove_folder("folder")
        assert storage.list("") == []

    def test_removing_what_is_missing_is_an_error(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError):
            storage.remove_file("missing")
        with pytest.raises(FileNotFoundError):
            storage.remove_folder("missing")

    def test_a_folder_is_not_removed_as_a_file(self, storage: Storage) -> None:
        storage.make_folder("folder")
        with pytest.raises(OSError, match="folder"):
            storage.remove_file("folder")
        assert storage.list("") == ["folder"]

    def test_sync_folder_works_on_the_root_and_refuses_what_is_missing(
        self, storage: Storage
    ) -> None:
        storage.sync_folder("")
        with pytest.raises(FileNotFoundError):
            storage.sync_folder("missing")

    # Rename and link

    def test_rename_moves_a_file_between_folders(self, storage: Storage) -> None:
        storage.make_folder("folder")
        put(storage, "a", b"moved")
        storage.rename("a", "folder/b")
        assert storage.list("") == ["folder"]
        assert get(storage, "folder/b") == b"moved"

    def test_rename_moves_a_folder_with_all_in_it(self, storage: Storage) -> None:
        storage.make_folder("staging")
        storage.make_folder("staging/new")
        put(storage, "staging/new/a", b"moved")
        storage.rename("staging/new", "final")
        assert get(storage, "final/a") == b"moved"
        assert storage.list("staging") == []

    @pytest.mark.parametrize("source", ["file", "folder"])
    @pytest.mark.parametrize("target", ["other-file", "empty-folder", "full-folder"])
    def test_rename_replaces_nothing(self, storage: Storage, source: str, target: str) -> None:
        put(storage, "file", b"new")
        put(storage, "other-file", b"old")
        for name in ("folder", "empty-folder", "full-folder"):
            storage.make_folder(name)
        put(storage, "full-folder/a", b"old")
        before = storage.list("")
        with pytest.raises(FileExistsError):
            storage.rename(source, target)
        assert storage.list("") == before
        assert get(storage, "other-file") == get(storage, "full-folder/a") == b"old"

    def test_rename_refuses_a_missing_source_and_a_missing_parent(self, storage: Storage) -> None:
        put(storage, "a", b"kept")
        with pytest.raises(FileNotFoundError):
            storage.rename("missing", "b")
        with pytest.raises(FileNotFoundError):
            storage.rename("a", "missing/a")
        assert get(storage, "a") == b"kept"

    def test_link_gives_a_second_name_that_outlives_the_first(self, storage: Storage) -> None:
        put(storage, "a", b"shared")
        storage.link("a", "b")
        storage.remove_file("a")
        assert get(storage, "b") == b"shared"

    def test_link_replaces_nothing(self, storage: Storage) -> None:
        put(storage, "a", b"new")
        put(storage, "b", b"old")
        with pytest.raises(FileExistsError):
            storage.link("a", "b")
        with pytest.raises(FileNotFoundError):
            storage.link("missing", "c")
        assert get(storage, "b") == b"old"

    # What is known without reading

    def test_stat_tells_files_folders_and_nothing_apart(self, storage: Storage) -> None:
        put(storage, "a", b"0123")
        storage.make_folder("folder")
        file, folder = storage.stat("a"), storage.stat("folder")
        assert file is not None
        assert (file.nbytes, file.is_folder) == (4, False)
        assert folder is not None
        assert (folder.nbytes, folder.is_folder) == (0, True)
        assert storage.stat("missing") is storage.stat("a/b") is storage.stat("x/y") is None

    def test_stat_is_stable_and_knows_a_change(self, storage: Storage) -> None:
        storage.append("a", b"0")
        before = storage.stat("a")
        assert storage.stat("a") == before
        storage.append("a", b"1")
        assert storage.stat("a") != before

    def test_two_files_have_two_identities(self, storage: Storage) -> None:
        put(storage, "a", b"same")
        put(storage, "b", b"same")
        first, second = storage.stat("a"), storage.stat("b")
        assert first is not None
        assert second is not None
        assert first.identity != second.identity

    def test_free_bytes_is_unknown_or_not_negative(self, storage: Storage) -> None:
        free = storage.free_bytes()
        assert free is None or free >= 0

    def test_a_path_is_described_so_that_people_find_it(self, storage: Storage) -> None:
        assert storage.describe("checkpoint-10/a").endswith("checkpoint-10/a")
        assert storage.describe() == storage.describe("")

    @pytest.mark.parametrize("path", ["/etc/passwd", "../a", "a/../../b", "a//b", "./a", "a\0b"])
    def test_a_path_outside_is_refused_by_every_call(self, storage: Storage, path: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: storage.create(path),
            lambda: storage.open(path),
            lambda: storage.append(path, b""),
            lambda: storage.make_folder(path),
            lambda: storage.stat(path),
            lambda: storage.list(path),
            lambda: storage.remove_file(path),
            lambda: storage.describe(path),
        ]
        for call in calls:
            with pytest.raises(ValueError, match="path"):
                call()

    # Locks

    def test_a_held_lock_is_refused_and_names_its_owner(self, storage: Storage) -> None:
        lock = storage.lock("run.lock", "host a, process 1")
        with pytest.raises(LockHeldError, match="host a, process 1"):
            storage.lock("run.lock", "host b")
        lock.release()

    def test_a_released_lock_can_be_taken_and_has_no_previous_owner(self, storage: Storage) -> None:
        storage.lock("run.lock", "first").release()
        lock = storage.lock("run.lock", "second")
        assert lock.previous_owner is None
        lock.release()

    def test_a_refused_attempt_does_not_loosen_the_lock(self, storage: Storage) -> None:
        lock = storage.lock("run.lock", "first")
        for _ in range(3):
            with pytest.raises(LockHeldError, match="first"):
                storage.lock("run.lock", "second")
        lock.release()

    def test_releasing_twice_does_not_take_the_lock_from_the_next_owner(
        self, storage: Storage
    ) -> None:
        first = storage.lock("run.lock", "first")
        first.release()
        second = storage.lock("run.lock", "second")
        first.release()
        with pytest.raises(LockHeldError, match="second"):
            storage.lock("run.lock", "third")
        second.release()

    def test_only_a_lock_that_is_held_is_called_so(self, storage: Storage) -> None:
        lock = storage.lock("run.lock", "first")
        lock.require_held()
        lock.release()
        with pytest.raises(LockHeldError):
            lock.require_held()

    def test_two_locks_do_not_know_each_other(self, storage: Storage) -> None:
        first, second = storage.lock("a.lock", "first"), storage.lock("b.lock", "second")
        first.release()
        second.release()
        assert storage.list("") == ["a.lock", "b.lock"]


# What a storage that several processes share must do besides: locks and renames between them.


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
