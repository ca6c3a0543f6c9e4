"""What only a real disk and real processes can show."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys

import pytest

from store.small_runs import RUN_ID, PlainLeaf, newest_state, read_state, save, state_of
from unbroken.errors import CorruptCheckpointError, LockHeldError, SaveError
from unbroken.storage import LocalStorage
from unbroken.storage import local as local_disk
from unbroken.store import Catalog, CheckpointReader, CheckpointWriter


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "run")


def test_a_failed_fsync_is_never_tried_again_on_the_same_file(storage, monkeypatch):
    calls = []

    def failing_once(fd):
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")

    with storage.create("a") as file:
        monkeypatch.setattr(local_disk.os, "fsync", failing_once)
        for _ in range(2):
            with pytest.raises(
                OSError, match=r"(Input/output|earlier write or fsync).*run/a"
            ) as caught:
                file.sync()
            assert caught.value.errno == errno.EIO
    assert len(calls) == 1


def test_short_writes_and_short_reads_are_completed(storage, monkeypatch):
    monkeypatch.setattr(local_disk, "_MAX_CALL_BYTES", 7)
    save(storage, 1, "x")
    assert read_state(CheckpointReader(storage, "checkpoint-1")) == state_of("x")


def in_child(work) -> int:
    """Run `work` in a forked child; return its exit code, 0 if it returned True."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_file_that_grows_too_large_is_a_save_error_that_leaves_the_old_one(storage):
    save(storage, 1)
    big = PlainLeaf("p", "f.safetensors", "n", "U8", (1 << 20,), bytes(1 << 20), 1 << 16)

    def save_under_a_limit() -> bool:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
        try:
            CheckpointWriter(storage, step=2, run_id=RUN_ID).write_leaves([big])
        except SaveError as error:
            return error.errno == errno.EFBIG and error.where.endswith("/f.safetensors")
        return False

    assert in_child(save_under_a_limit) == 0
    assert newest_state(storage) == state_of("state at 1")


def test_running_out_of_descriptors_is_not_called_damage(storage):
    save(storage, 1)
    reader = CheckpointReader(storage, "checkpoint-1")

    def read_without_descriptors() -> bool:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        try:
            reader.check_rest()
        except CorruptCheckpointError:
            return False
        except OSError as error:
            return error.errno == errno.EMFILE
        return False

    assert in_child(read_without_descriptors) == 0


def test_a_lock_that_an_earlier_version_holds_is_refused(storage, tmp_path):
    def hold_as_earlier_versions_do() -> int:
        with open(tmp_path / "run/run.lock", "w+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return in_child(lambda: raises_lock_held(storage)) == 0

    assert in_child(hold_as_earlier_versions_do) == 0
    held = storage.lock("run.lock", "this version")
    assert in_child(lambda: is_refused_to_earlier_versions(tmp_path / "run/run.lock")) == 0
    held.release()


def raises_lock_held(storage) -> bool:
    try:
        storage.lock("run.lock", "another")
    except LockHeldError:
        return True
    return False


def is_refused_to_earlier_versions(path) -> bool:
    with open(path, "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_checkpoint_folder_that_is_a_link_is_refused(storage, tmp_path):
    save(storage, 1)
    os.rename(tmp_path / "run/checkpoint-1", tmp_path / "elsewhere")
    (tmp_path / "run/checkpoint-1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCheckpointError, match="is not a folder"):
        Catalog(storage).open(1)


def test_a_file_is_never_created_or_appended_through_a_link(storage, tmp_path):
    (tmp_path / "run/link").symlink_to(tmp_path / "outside")
    with pytest.raises(FileExistsError):
        storage.create("link")
    with pytest.raises(OSError, match="symbolic link"):
        storage.append("link", b"x")
    assert not (tmp_path / "outside").exists()


def test_where_the_system_cannot_rename_without_replacing_it_is_checked_first(
    storage, monkeypatch, tmp_path
):
    from unbroken.storage import local

    monkeypatch.setattr(local, "_renameat2", lambda: lambda *names: errno.EINVAL)
    save(storage, 1, "x")
    storage.make_folder("empty")
    with pytest.raises(FileExistsError):
        storage.rename("checkpoint-1", "empty")
    storage.rename("checkpoint-1", "moved")
    assert (tmp_path / "run/moved/state.json").exists()


def test_a_run_directory_is_made_with_its_parents(tmp_path):
    LocalStorage(tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c").is_dir()


HEAVY = """
import sys
import unbroken.store, unbroken.storage
print([name for name in ("torch", "numpy", "pytest") if name in sys.modules])
"""


def test_importing_the_store_imports_no_torch_and_no_numpy():
    command = [sys.executable, "-c", HEAVY]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
