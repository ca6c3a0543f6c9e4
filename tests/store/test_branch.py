"""A branch is a whole run of its own, from one moment of another run that it leaves as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest

from store.branched_runs import (
    BEST,
    CHILD_ID,
    NAME,
    child_of,
    content_of,
    make_branch,
    make_parent,
    save_in,
)
from store.small_runs import RUN_ID, open_run, read_state, state_of
from unbroken.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    LockHeldError,
    RunDirectoryError,
)
from unbroken.storage import FolderStorage, LocalStorage, MemoryStorage
from unbroken.store import Catalog, KeepPolicy, Lineage, RunDirectory, branch, has_branch


@pytest.fixture
def disk():
    storage = MemoryStorage()
    make_parent(storage)
    return storage


@pytest.fixture
def folder(tmp_path):
    make_parent(LocalStorage(tmp_path))
    return tmp_path


def everything_in(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# What a branch has


def test_a_branch_has_the_checkpoint_the_best_one_and_the_metrics_up_to_there(disk):
    make_branch(disk).close()
    found = content_of(child_of(disk))
    assert found["states"] == {step: state_of(f"state at {step}") for step in (BEST, 20)}
    assert found["metrics"] == [{"step": 10}, {"step": 20}]
    assert found["id"] == CHILD_ID


def test_the_files_of_its_checkpoints_are_those_of_the_parent(folder):
    make_branch(LocalStorage(folder)).close()
    for step in (BEST, 20):
        for file in (folder / f"checkpoint-{step}").iterdir():
            assert file.samefile(folder / "branches" / NAME / file.relative_to(folder))


def test_the_metrics_are_a_copy(folder):
    with make_branch(LocalStorage(folder)) as child:
        child.metrics.append({"step": 21})
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_branch_at_the_best_step_takes_one_checkpoint(disk):
    make_branch(disk, BEST).close()
    assert list(content_of(child_of(disk))["states"]) == [BEST]


def test_a_best_checkpoint_that_is_no_more_is_left_out(folder):
    shutil.rmtree(folder / f"checkpoint-{BEST}")
    make_branch(LocalStorage(folder)).close()
    assert list(content_of(child_of(LocalStorage(folder)))["states"]) == [20]


def test_the_lineage_stands_in_run_json(folder):
    make_branch(LocalStorage(folder)).close()
    parent = RunDirectory.open_readonly(folder)
    digests = {step: parent.catalog.open(step).manifest.state_digest for step in (BEST, 20)}
    taken = [{"state_digest": digests[step], "step": step} for step in (BEST, 20)]
    assert json.loads((folder / "branches" / NAME / "run.json").read_text()) == {
        "created": "1970-01-01T00:00:00.000+00:00",
        "format": "unbroken run",
        "id": CHILD_ID,
        "parent": {"checkpoints": taken, "id": RUN_ID, "path": "../..", "step": 20},
        "version": 2,
    }


def test_the_lineage_is_read_back(disk):
    with make_branch(disk) as child:
        assert (child.parent.run_id, child.parent.step) == (RUN_ID, 20)
        assert child.parent.state_digest == child.catalog.open(20).manifest.state_digest
    assert RunDirectory.open_readonly(disk).parent is None


def test_the_history_begins_with_the_branching(disk):
    with make_branch(disk) as child:
        (event,) = child.history.records()
    assert (event["event"], event["parent"]["step"]) == ("branched", 20)


def test_a_copy_of_a_branch_is_whole(folder, tmp_path_factory):
    make_branch(LocalStorage(folder)).close()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "run"
    shutil.copytree(folder / "branches" / NAME, elsewhere)
    shutil.rmtree(folder)
    with RunDirectory.open(elsewhere) as run:
        assert run.catalog.newest_intact()[0].step == 20


def test_a_branch_of_a_branch_begins_in_what_its_parent_took_over(disk):
    make_branch(disk).close()
    with make_branch(child_of(disk), name="lower") as grandchild:
        assert grandchild.parent.run_id == CHILD_ID
        assert read_state(grandchild.catalog.open(20)) == state_of("state at 20")


# Parent and child do not depend on each other


def test_the_parent_is_left_as_it_was(folder):
    before = everything_in(folder)
    with make_branch(LocalStorage(folder)) as child:
        save_in(child, 25)
        child.prune(KeepPolicy(last=1))
    after = everything_in(folder)
    assert {name: after[name] for name in before} == before
    assert all(name in before or name.startswith("branches/") for name in after)


def test_the_parent_may_be_in_use(folder):
    with RunDirectory.open(folder) as parent, make_branch(LocalStorage(folder)) as child:
        save_in(parent, 40)
        save_in(child, 25)
        assert child.catalog.newest_intact()[0].step == 25


def test_the_parent_may_lose_its_checkpoints(folder):
    make_branch(LocalStorage(folder)).close()
    before = content_of(child_of(LocalStorage(folder)))
    with RunDirectory.open(folder) as parent:
        assert parent.prune(KeepPolicy(last=1)).removed == ("checkpoint-20", "checkpoint-10")
        parent.metrics.cut(0)
    assert content_of(child_of(LocalStorage(folder))) == before


def test_a_start_of_the_parent_does_not_touch_its_branches(folder):
    make_branch(LocalStorage(folder)).close()
    (folder / "branches/.staging/other").mkdir()
    before = everything_in(folder / "branches")
    with RunDirectory.open(folder) as parent:
        assert parent.left_over == ()
    assert everything_in(folder / "branches") == before
    assert (folder / "branches/.staging/other").exists()


def test_branches_alone_do_not_make_a_directory_a_run(tmp_path):
    (tmp_path / "branches").mkdir()
    with pytest.raises(RunDirectoryError, match=r"holds something else.*branches"):
        RunDirectory.open(tmp_path)


# What was taken over is the branch's own


def test_retention_may_remove_what_was_taken_over(folder):
    with make_branch(LocalStorage(folder)) as child:
        save_in(child, 25)
        assert child.prune(KeepPolicy(last=1)).removed == ("checkpoint-20", "checkpoint-10")
    assert Catalog(LocalStorage(folder), RUN_ID).open(20).step == 20


def test_retention_keeps_the_best_that_was_taken_over(disk):
    with make_branch(disk) as child:
        save_in(child, 25)
        pruned = child.prune(KeepPolicy(last=1), best_steps=[BEST])
    assert pruned.reasons == {"checkpoint-25": "last", "checkpoint-10": "best"}


def test_a_checkpoint_of_the_parent_that_was_not_taken_over_is_not_its_own(folder):
    make_branch(LocalStorage(folder)).close()
    child = folder / "branches" / NAME
    shutil.copytree(folder / "checkpoint-30", child / "checkpoint-30")
    with RunDirectory.open(child) as run:
        with pytest.raises(CorruptCheckpointError, match="belongs to another run"):
            run.catalog.open(30)
        assert run.prune(KeepPolicy(last=1)).reasons["checkpoint-30"].startswith("it belongs to an")


def test_another_state_under_the_step_that_was_taken_over_is_not_its_own(folder):
    make_branch(LocalStorage(folder)).close()
    with open_run(LocalStorage(folder)) as parent:
        save_in(parent, 99)
    child = child_of(LocalStorage(folder))
    digests = {20: "0" * 32}
    lineage = Lineage(RUN_ID, "../..", 20, digests)
    with pytest.raises(CorruptCheckpointError, match="belongs to another run"):
        Catalog(child, CHILD_ID, lineage).open(20)


def test_a_branch_never_goes_on_from_before_its_beginning(folder):
    make_branch(LocalStorage(folder)).close()
    flip(folder / "branches" / NAME / "checkpoint-20" / "model.safetensors")
    run = RunDirectory.open_readonly(folder / "branches" / NAME)
    reader, rejected = run.catalog.newest_intact()
    assert reader is None
    assert rejected[-1].reason == "the branch begins at step 20, after it"


def test_a_checkpoint_that_the_branch_itself_wrote_may_be_older_than_its_beginning(disk):
    with make_branch(disk) as child:
        save_in(child, 15)
        child.catalog.set_aside(20, "rewound")
        assert child.catalog.newest_intact()[0].step == 15


# The same call again


def test_the_same_call_again_opens_the_branch_as_it_is(disk):
    with make_branch(disk) as child:
        save_in(child, 25)
    before = content_of(child_of(disk))
    for step in (20, None):
        with make_branch(disk, step) as child:
            assert child.catalog.newest_intact()[0].step == 25
    assert content_of(child_of(disk)) == before


def test_it_opens_although_the_parent_lost_the_checkpoint(folder):
    make_branch(LocalStorage(folder)).close()
    shutil.rmtree(folder / "checkpoint-20")
    make_branch(LocalStorage(folder)).close()


def test_another_step_is_refused_and_told_what_the_branch_is(disk):
    make_branch(disk).close()
    with pytest.raises(ConfigError, match="leaves at another step: expected 30, found 20") as error:
        make_branch(disk, 30)
    assert "ask for step 20 or for none" in error.value.hint
    assert "choose another name" in error.value.hint


def test_a_branch_of_another_run_is_refused(disk):
    make_branch(disk).close()
    disk.make_folder("other")
    with RunDirectory.open(FolderStorage(disk, "other")) as other:
        save_in(other, 20)
        other.storage.make_folder("branches")
        disk.rename(f"branches/{NAME}", f"other/branches/{NAME}")
        with pytest.raises(RunDirectoryError, match="is a branch of another run"):
            branch(other, NAME, step=20)


@pytest.mark.parametrize("has_run", [False, True])
def test_what_is_no_branch_is_refused_untouched(folder, has_run):
    place = folder / "branches" / NAME
    place.mkdir(parents=True)
    if has_run:
        RunDirectory.open(place).close()
    before = everything_in(folder)
    with pytest.raises(RunDirectoryError, match="is no branch"):
        make_branch(LocalStorage(folder))
    assert everything_in(folder) == before


def test_two_processes_in_one_branch_are_refused(disk):
    with make_branch(disk), pytest.raises(LockHeldError):
        make_branch(disk)


# What cannot be a branch


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "a/b", "a b", "ü", "a" * 101, "\n"]
)
def test_what_is_no_safe_folder_name_is_refused(disk, name):
    with pytest.raises(ConfigError, match="is no name"):
        make_branch(disk, name=name)
    assert disk.stat("branches") is None


@pytest.mark.parametrize("name", ["lr-low", "3e-4", "a.b_c", "checkpoint-20", "run.json"])
def test_other_names_are_taken(disk, name):
    make_branch(disk, name=name).close()
    assert has_branch(RunDirectory.open_readonly(disk), name)


def test_a_step_without_a_checkpoint_is_refused_and_makes_nothing(disk):
    with pytest.raises(CheckpointNotFoundError, match=r"one of the steps \[10, 20, 30\], found 25"):
        make_branch(disk, 25)
    assert disk.stat("branches") is None


def test_a_new_branch_needs_a_step(disk):
    with pytest.raises(ConfigError, match="has no branch lr-low yet"):
        make_branch(disk, None)


@pytest.mark.parametrize("step", [BEST, 20])
def test_a_damaged_checkpoint_makes_no_branch_and_is_named(folder, step):
    flip(folder / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=rf"^checkpoint-{step}: model\..*is damaged"):
        make_branch(LocalStorage(folder))
    assert not (folder / "branches" / NAME).exists()


@pytest.mark.parametrize("left", [15, None])
def test_a_branch_gets_what_is_left_of_metrics_that_were_shortened_or_lost(left, disk):
    if left is None:
        disk.remove_file("metrics.jsonl")
    else:
        disk.truncate("metrics.jsonl", left)
    with make_branch(disk) as child:
        assert child.metrics.nbytes <= (left or 0)


# A parent that goes on meanwhile


class Meanwhile(MemoryStorage):
    """Something happens to the run just before the first call that makes a given path."""

    def __init__(self, before, happens):
        super().__init__()
        self._before, self._happens = before, happens

    def now(self, target):
        if self._before in target:
            self._before = "nothing else"
            self._happens(self)

    def link(self, source, target):
        self.now(target)
        super().link(source, target)

    def append(self, path, data):
        self.now(path)
        super().append(path, data)

    def create(self, path, nbytes=0):
        self.now(path)
        return super().create(path, nbytes)


def retention(storage):
    with open_run(storage) as run:
        run.prune(KeepPolicy(last=1))


def rewinding(storage):
    with open_run(storage) as run:
        run.catalog.set_aside(20, "rewound")
        run.metrics.cut(0)


def saving_again(storage):
    with open_run(storage) as run:
        save_in(run, 20, other=True)


@pytest.mark.parametrize("happens", [retention, rewinding])
@pytest.mark.parametrize("before", ["lr-low/checkpoint-20/model", "lr-low/checkpoint-20/manifest"])
def test_a_checkpoint_that_goes_away_meanwhile_is_an_error_and_no_branch(before, happens):
    storage = Meanwhile(before, happens)
    make_parent(storage)
    with pytest.raises(
        CheckpointNotFoundError, match="went away while the branch was made"
    ) as error:
        make_branch(storage)
    assert "pinned" in error.value.hint
    assert not has_branch(RunDirectory.open_readonly(storage), NAME)


@pytest.mark.parametrize("happens", [rewinding, saving_again])
def test_metrics_are_not_taken_from_another_future(happens):
    storage = Meanwhile("lr-low/metrics.jsonl", happens)
    make_parent(storage)
    with pytest.raises(CheckpointNotFoundError, match="went away"):
        make_branch(storage)
    assert not has_branch(RunDirectory.open_readonly(storage), NAME)


# Where there are no links


class NoLinks(LocalStorage):
    code = errno.EXDEV

    def link(self, source, target):
        raise OSError(self.code, os.strerror(self.code), target)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_linked_they_are_copied(folder, monkeypatch, code):
    monkeypatch.setattr(NoLinks, "code", code)
    make_branch(NoLinks(folder)).close()
    copied = folder / "branches" / NAME / "checkpoint-20" / "model.safetensors"
    assert copied.stat().st_nlink == 1
    assert content_of(child_of(LocalStorage(folder)))["states"][20] == state_of("state at 20")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_other_failures_of_linking_are_not_taken_for_that(folder, monkeypatch, code):
    monkeypatch.setattr(NoLinks, "code", code)
    with pytest.raises(RunDirectoryError, match=os.strerror(code)):
        make_branch(NoLinks(folder))
    assert not (folder / "branches" / NAME).exists()


# A killed attempt


def test_what_a_killed_attempt_left_is_cleared_for_another_step(folder):
    make_branch(LocalStorage(folder)).close()
    (folder / "branches" / NAME).rename(folder / "branches/.staging" / NAME)
    with make_branch(LocalStorage(folder), 30) as child:
        assert child.parent.step == 30
        assert [step for step, _ in child.catalog.folders()] == [BEST, 30]


def test_a_strange_file_where_a_branch_is_made_is_refused_and_kept(folder):
    mine = folder / "branches/.staging" / NAME / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"mine\.txt: is in the way"):
        make_branch(LocalStorage(folder))
    assert mine.read_text() == "mine"


# run.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "parent has an impossible 'id'"),
        ({"step": 25}, "does not name one checkpoint for its step"),
        ({"checkpoints": [{"step": 20, "state_digest": "x"}]}, "impossible 'state_digest'"),
        ({"more": 1}, "parent has an unknown field"),
    ],
)
def test_an_impossible_lineage_is_refused(folder, change, message):
    make_branch(LocalStorage(folder)).close()
    path = folder / "branches" / NAME / "run.json"
    identity = json.loads(path.read_text())
    path.write_text(json.dumps({**identity, "parent": {**identity["parent"], **change}}))
    for name in ("history.jsonl", "metrics.jsonl"):  # else these and the checkpoints tell it
        (path.parent / name).unlink()
    with pytest.raises(RunDirectoryError, match=message):
        RunDirectory.open(folder / "branches" / NAME)


@pytest.mark.parametrize(("version", "missing"), [(1, False), (2, True)])
def test_the_version_says_whether_there_is_a_lineage(folder, version, missing):
    make_branch(LocalStorage(folder)).close()
    path = folder / "branches" / NAME / "run.json"
    identity = {**json.loads(path.read_text()), "version": version}
    if missing:
        del identity["parent"]
    path.write_text(json.dumps(identity))
    for name in ("history.jsonl", "metrics.jsonl"):
        (path.parent / name).unlink()
    with pytest.raises(RunDirectoryError, match="'parent'"):
        RunDirectory.open_readonly(folder / "branches" / NAME)
