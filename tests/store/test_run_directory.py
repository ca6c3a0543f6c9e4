"""A run directory belongs to one run and one live process, or is refused untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from store.small_runs import RUN_ID, newest_state, open_run, save, state_of
from unbroken.errors import LockHeldError, RunDirectoryError
from unbroken.storage import LocalStorage
from unbroken.store import KeepPolicy, RunDirectory
from unbroken.testing import POWER_CUT_MODES, FaultyStorage, PowerCut


def everything_in(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_new_run_gets_an_identity_that_stays(tmp_path):
    with RunDirectory.open(tmp_path / "runs/new") as first:
        assert len(first.run_id) == 32
    with RunDirectory.open(tmp_path / "runs/new") as again:
        assert again.run_id == first.run_id
        assert again.previous_owner is None


def test_two_runs_have_two_identities(tmp_path):
    with RunDirectory.open(tmp_path / "a") as first, RunDirectory.open(tmp_path / "b") as second:
        assert first.run_id != second.run_id


def test_the_identity_comes_from_the_source_given(tmp_path):
    with open_run(LocalStorage(tmp_path)) as run:
        assert (run.run_id, run.created) == (RUN_ID, "1970-01-01T00:00:00.000+00:00")
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "created": "1970-01-01T00:00:00.000+00:00",
        "format": "unbroken run",
        "id": RUN_ID,
        "version": 1,
    }


def test_a_second_owner_is_refused_and_told_who_the_first_is(tmp_path):
    with (
        RunDirectory.open(tmp_path, clock=lambda: 0.0),
        pytest.raises(LockHeldError, match=rf"process {os.getpid()}, boot .*, since 1970-"),
    ):
        RunDirectory.open(tmp_path)
    RunDirectory.open(tmp_path).close()


def test_a_lock_left_by_a_dead_process_is_taken_and_told():
    storage = FaultyStorage()
    open_run(storage)  # and never closed
    with open_run(storage.after_kill()) as run:
        assert run.previous_owner == "test"


def test_closing_twice_is_allowed(tmp_path):
    run = RunDirectory.open(tmp_path)
    run.close()
    run.close()
    assert run.is_readonly


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-5", "history.jsonl", ".git"])
def test_a_directory_of_something_else_is_refused_untouched(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(RunDirectoryError, match=f"holds something else.*{name}") as caught:
        RunDirectory.open(tmp_path)
    assert "choose another directory" in caught.value.hint
    assert everything_in(tmp_path) == {name}


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "lost+found"])
def test_what_operating_systems_leave_is_tolerated(tmp_path, name):
    (tmp_path / name).mkdir()
    RunDirectory.open(tmp_path).close()
    assert (tmp_path / name).exists()


def test_other_files_beside_a_run_are_tolerated_and_kept(tmp_path):
    RunDirectory.open(tmp_path).close()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".staging").mkdir()
    (tmp_path / ".staging/mine").write_text("mine")
    with RunDirectory.open(tmp_path) as run:
        assert run.left_over == (".staging/mine",)
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ('{"format":"unbroken run"', "is not JSON"),
        ("{}", "has no 'format'"),
        ('{"name":"another tool"}', "has no 'format'"),
        ('{"format":"other","version":1}', "is of another program"),
        ('{"format":"unbroken run","version":3}', "has another version: expected 1 or 2, found 3"),
        ('{"format":"unbroken run","version":1}', "has no 'id'"),
        ('{"format":"unbroken run","version":1,"id":"a","created":"b","x":1}', "unknown field"),
    ],
)
def test_a_run_json_that_is_not_ours_is_refused_untouched(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=message) as caught:
        RunDirectory.open(tmp_path)
    assert caught.value.hint
    assert everything_in(tmp_path) == {"run.json"}


@pytest.mark.parametrize("below", ["", "/runs/deep"])
def test_a_path_that_is_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunDirectoryError, match="file"):
        RunDirectory.open(f"{tmp_path}/file{below}")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_directory_that_cannot_be_written_is_refused(code):
    whole = FaultyStorage()
    open_run(whole).close()
    for step in range(1, whole.steps + 1):
        storage = FaultyStorage(fail_at=step, error=code)
        with pytest.raises(RunDirectoryError, match=os.strerror(code)):
            open_run(storage)
        open_run(storage).close()  # and once it can be written, it is taken


@pytest.mark.parametrize("mode", ["kill", *POWER_CUT_MODES])
def test_a_first_start_that_is_cut_anywhere_can_start_again(mode):
    whole = FaultyStorage()
    open_run(whole).close()
    for step in range(1, whole.steps + 1):
        storage = FaultyStorage(cut_at=step)
        with pytest.raises(PowerCut):
            open_run(storage)
        after = storage.after_kill() if mode == "kill" else storage.after_power_cut(mode)
        with open_run(after):
            save(after, 1)


def test_an_identity_once_given_survives_a_power_cut():
    storage = FaultyStorage()
    run = RunDirectory.open(storage)
    for mode in POWER_CUT_MODES:
        assert RunDirectory.open(storage.after_power_cut(mode)).run_id == run.run_id


# Looking


def test_looking_needs_no_lock_and_changes_nothing(tmp_path):
    with RunDirectory.open(tmp_path) as run:
        save(run.storage, 5, run_id=run.run_id)
        (tmp_path / ".staging/checkpoint-9.1").mkdir()
        before = everything_in(tmp_path)
        look = RunDirectory.open_readonly(tmp_path)
        assert look.catalog.newest_intact()[0].step == 5
        assert (look.run_id, look.is_readonly) == (run.run_id, True)
        assert everything_in(tmp_path) == before


def test_looking_makes_nothing(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunDirectoryError, match="is not a run's directory"):
            RunDirectory.open_readonly(path)
    assert everything_in(tmp_path) == set()


def test_a_run_behind_a_link_can_be_looked_at(tmp_path):
    with RunDirectory.open(tmp_path / "run") as run:
        (tmp_path / "link").symlink_to(tmp_path / "run")
        assert RunDirectory.open_readonly(tmp_path / "link").run_id == run.run_id


def test_who_only_looks_cannot_prune(tmp_path):
    RunDirectory.open(tmp_path).close()
    with pytest.raises(RunDirectoryError, match="reading only"):
        RunDirectory.open_readonly(tmp_path).prune(KeepPolicy(last=1))


# The parts


def test_the_parts_work_together(tmp_path):
    with RunDirectory.open(tmp_path) as run:
        for step in (1, 2):
            save(run.storage, step, run_id=run.run_id)
            run.metrics.append({"step": step})
        assert run.prune(KeepPolicy(last=1)).removed == ("checkpoint-1",)
        assert run.set_aside_metrics() == "set-aside/metrics.jsonl.1"
        run.metrics.cut(0)
    assert (tmp_path / "set-aside/metrics.jsonl.1").read_bytes() == b'{"step":1}\n{"step":2}\n'
    assert newest_state(LocalStorage(tmp_path)) == state_of("state at 2")


def test_the_next_start_sweeps_staging_and_trash_but_not_strange_files(tmp_path):
    with RunDirectory.open(tmp_path) as run:
        save(run.storage, 1, run_id=run.run_id)
    (tmp_path / ".staging/checkpoint-2.1").mkdir()
    (tmp_path / ".staging/checkpoint-2.1/model.safetensors").touch()
    (tmp_path / ".trash/checkpoint-1.1").mkdir(parents=True)
    (tmp_path / ".trash/checkpoint-0.1").mkdir()
    (tmp_path / ".trash/checkpoint-0.1/mine").touch()
    with RunDirectory.open(tmp_path) as run:
        assert run.left_over == (".trash/checkpoint-0.1",)
    assert list((tmp_path / ".staging").iterdir()) == []


def test_a_start_that_is_cut_while_it_makes_a_run_json_anew_gives_the_same_run():
    def damaged():
        storage = FaultyStorage()
        with open_run(storage) as run:
            save(storage, 1)
            run.history.append({"event": "saved"})
            run.history.sync()
        storage.truncate("run.json", 20)
        storage.sync_file("run.json")
        return storage

    whole = damaged()
    whole.arm()
    open_run(whole).close()
    for step in range(1, whole.steps + 1):
        storage = damaged()
        storage.arm(cut_at=step)
        with pytest.raises(PowerCut):
            open_run(storage)
        for after in (storage.after_kill(), storage.after_power_cut("forget")):
            with open_run(after) as run:
                assert (run.run_id, run.catalog.folders()) == (RUN_ID, [(1, "checkpoint-1")])


def test_copies_beside_what_else_a_run_has_are_where_a_run_begins(tmp_path):
    with RunDirectory.open(tmp_path / "old") as old:
        save(old.storage, 1, run_id=old.run_id)
    new = shutil.copytree(tmp_path / "old", tmp_path / "new")
    for name in ("run.json", "run.lock"):
        (new / name).unlink()
    (new / "branches").mkdir()
    with RunDirectory.open(new) as run:
        assert run.run_id != old.run_id


def test_a_file_for_other_programs_is_put_once_and_set_aside_for_another(tmp_path):
    path = tmp_path / "tokenizer.json"
    with RunDirectory.open(tmp_path) as run:
        run.put_file(path.name, b"first")
        first = path.stat()
        run.put_file(path.name, b"first")
        assert path.stat() == first
        run.put_file(path.name, b"other")
    assert path.read_bytes() == b"other"
    assert (tmp_path / "set-aside" / "tokenizer.json.1").read_bytes() == b"first"
    assert len(everything_in(tmp_path)) == len(["run.json", "run.lock", path, "set-aside", "first"])


@pytest.mark.parametrize("mode", ["kill", *POWER_CUT_MODES])
def test_a_file_for_other_programs_is_whole_or_not_there_wherever_it_is_cut(mode):
    def with_the_first():
        storage = FaultyStorage()
        run = open_run(storage)
        run.put_file("a.json", b"first")
        storage.arm()
        return storage, run

    whole, run = with_the_first()
    run.put_file("a.json", b"other")
    for step in range(1, whole.steps + 1):
        storage, run = with_the_first()
        storage.arm(cut_at=step)
        with pytest.raises(PowerCut):
            run.put_file("a.json", b"other")
        after = storage.after_kill() if mode == "kill" else storage.after_power_cut(mode)
        assert content_of(after) in (b"first", b"other", None)
        with open_run(after) as again:
            again.put_file("a.json", b"other")
        assert content_of(after) == b"other"
        assert "a.json.new" not in after.list("")


def content_of(storage):
    if "a.json" not in storage.list(""):
        return None
    buffer = bytearray(storage.stat("a.json").nbytes)
    with storage.open("a.json") as file:
        file.read_into(0, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "history.jsonl", "run.lock"])
def test_no_file_for_other_programs_takes_the_place_of_the_runs_own(tmp_path, name):
    with RunDirectory.open(tmp_path) as run, pytest.raises(RunDirectoryError, match="of the run"):
        run.put_file(name, b"")
