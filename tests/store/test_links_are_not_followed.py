"""A run directory from elsewhere, with symbolic links in it: nothing outside of it is touched.

Each link leads to a folder or file of its own outside, which looks as what unbroken would delete,
move or change there.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

import pytest
from torch import nn

from unbroken import Checkpointer
from unbroken.errors import UnbrokenError
from unbroken.storage import LocalStorage
from unbroken.store import KeepPolicy, RunDirectory, branch, export_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with checkpoints 0, 2, 4, 6, some of them set aside, and a branch."""
    folder = tmp_path_factory.mktemp("made") / "run"
    with checkpointer(folder) as begun:
        for step in (0, 2, 4, 6):
            begun.log({"step": step})
            begun.save(step)
    go_on(folder, 2)
    with checkpointer(folder, branch="longer") as left:
        left.resume(2)
        left.save(4)
    return folder


def checkpointer(folder, **options):
    return Checkpointer(folder, model=nn.Linear(300, 2), **options)


def go_on(folder, which, **options):
    with checkpointer(folder, **options) as run:
        report = run.resume(which)
        run.log({"step": 4})
        run.save(4)
    return report


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def everything(folder):
    """Return all names below a folder, with the bytes of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def leads_out(run, name, made, outside):
    """Put a link to something outside in the place of `name`."""
    there = outside / name.replace("/", "-")
    if name in (".staging", ".trash"):
        shutil.rmtree(run / name, ignore_errors=True)
    if (made / name).is_dir() and name not in (".staging", ".trash"):
        shutil.copytree(made / name, there, symlinks=True)
        shutil.rmtree(run / name)
    elif (run / name).exists():
        shutil.move(run / name, there)
    else:  # a folder that a killed process would have left
        shutil.copytree(made / "checkpoint-2", there / "checkpoint-2.1")
        shutil.copytree(made / "checkpoint-2", there / "checkpoint-2.replaced")
        (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(there)


PLACES = (
    *(".staging", ".trash", "set-aside", "branches", "branches/.staging", "branches/longer"),
    *("checkpoint-0", "checkpoint-2", "checkpoint-4", "checkpoint-4/model.safetensors"),
    *("checkpoint-4/manifest.json", "run.lock", "run.json", "metrics.jsonl", "history.jsonl"),
    *(".staging/checkpoint-2.1", ".trash/checkpoint-2.1", "branches/longer/checkpoint-2"),
)


def start(run):
    go_on(run, "auto", keep=KeepPolicy(last=1))


def rewind(run):
    go_on(run, 0)


def reseed_rank(run):
    go_on(run, "never")


def go_on_in_the_branch(run):
    go_on(run, "auto", branch="longer")


def make_a_branch(run):
    branch(RunDirectory.open_readonly(run), "new", step=4).close()


def verify(run):
    for step, _ in RunDirectory.open_readonly(run).catalog.folders():
        RunDirectory.open_readonly(run).catalog.open(step).verify()


def export(run):
    reader = RunDirectory.open_readonly(run).catalog.open(4)
    export_weights(reader, run.parent / "exported")


@pytest.mark.parametrize(
    "act", [start, reseed_rank, go_on_in_the_branch, make_a_branch, verify, export]
)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_outside_is_touched(act, place, run, made, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    leads_out(run, place, made, outside)
    before = everything(outside)
    with suppress(UnbrokenError, OSError):  # refused, or done beside it: either is right
        act(run)
    assert everything(outside) == before


@pytest.mark.parametrize("place", [".staging", "set-aside", "metrics.jsonl", "history.jsonl"])
def test_a_start_that_needs_what_is_a_link_says_so(place, run, made, tmp_path):
    (tmp_path / "outside").mkdir()
    leads_out(run, place, made, tmp_path / "outside")
    with pytest.raises(OSError, match=f"{place}.*symbolic link, which is not followed"):
        rewind(run)


def test_a_checkpoint_that_is_a_link_is_named_and_walked_past(run, made, tmp_path):
    (tmp_path / "outside").mkdir()
    leads_out(run, "checkpoint-4", made, tmp_path / "outside")
    report = go_on(run, "auto")
    assert report.step == 2
    assert "a symbolic link is not followed" in report.rejected[0].reason


def test_a_run_directory_may_be_a_link_itself(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    assert go_on(tmp_path / "link", "must").step == 4
    assert go_on(tmp_path / "link", 2).step == 2


def test_a_folder_that_becomes_a_link_is_refused_by_every_call(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "note").write_text("theirs")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "in").symlink_to(tmp_path / "outside")
    storage = LocalStorage(tmp_path / "root")
    for call in (
        lambda: storage.create("in/new"),
        lambda: storage.create("in/new", 4 << 20),
        lambda: storage.open("in/note"),
        lambda: storage.append("in/note", b"x"),
        lambda: storage.truncate("in/note", 0),
        lambda: storage.sync_file("in/note"),
        lambda: storage.make_folder("in/new"),
        lambda: storage.sync_folder("in"),
        lambda: storage.rename("in/note", "note"),
        lambda: storage.link("in/note", "note"),
        lambda: storage.remove_file("in/note"),
        lambda: storage.remove_folder("in/new"),
        lambda: storage.list("in"),
        lambda: storage.lock("in/run.lock", "me"),
    ):
        with pytest.raises(OSError, match="symbolic link"):
            call()
    assert storage.stat("in/note") is None
    assert os.listdir(tmp_path / "outside") == ["note"]
    assert (tmp_path / "outside" / "note").read_text() == "theirs"
