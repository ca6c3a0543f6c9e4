"""A run directory on two devices, where the kernel refuses renames: the same promises hold.

Mounts inside of it, and the lower layers of overlayfs, which the images of containers are made of.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

from crash.faulty_runs import prepared, steps_of
from crash.oracle import check_after_cut
from crash.save_scenarios import SCENARIOS
from store.small_runs import newest_state, open_run, save, state_of
from unbroken import Checkpointer
from unbroken.storage import LocalStorage
from unbroken.store import KeepPolicy, RunDirectory, branch
from unbroken.testing import FaultyStorage, PowerCut


def refused(source, target):
    return OSError(errno.EXDEV, os.strerror(errno.EXDEV), source, None, target)


class Mounted(FaultyStorage):
    """A disk of which one folder is a mount of another device."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def is_there(self, path):
        return path == self.folder or path.startswith(f"{self.folder}/")

    def rename(self, source, target):
        if self.is_there(source) != self.is_there(target):
            raise refused(source, target)
        super().rename(source, target)

    def link(self, source, target):
        if self.is_there(source) != self.is_there(target):
            raise refused(source, target)
        super().link(source, target)


class Lower(FaultyStorage):
    """A disk as overlayfs shows it: a folder of the image cannot be renamed, its files can."""

    def __init__(self):
        super().__init__()
        self.lower = set()

    def arm(self, *arguments, **options):
        self.lower = {name for name in self.list("") if self.stat(name).is_folder}
        super().arm(*arguments, **options)

    def rename(self, source, target):
        if source in self.lower:
            raise refused(source, target)
        super().rename(source, target)

    def remove_folder(self, path):
        super().remove_folder(path)
        self.lower.discard(path)


DISKS = {
    "staging mounted": lambda: Mounted(".staging"),
    "set-aside mounted": lambda: Mounted("set-aside"),
    "trash mounted": lambda: Mounted(".trash"),
    "an image": Lower,
}
EACH_DISK = pytest.mark.parametrize("disk", DISKS.values(), ids=list(DISKS))


RENAMING = (
    *("a save over an older one", "a save and then retention"),
    *("a save in place of another state", "a save in place of the only checkpoint"),
)


@EACH_DISK
@pytest.mark.parametrize("scenario", [SCENARIOS[name] for name in RENAMING], ids=RENAMING)
def test_after_any_cut_the_newest_checkpoint_is_the_old_or_the_new_one(scenario, disk):
    for step in range(1, steps_of(scenario, disk) + 1):
        storage, saved = prepared(scenario, disk), []
        storage.arm(cut_at=step)
        with pytest.raises(PowerCut):
            scenario.act(storage, lambda saved=saved: saved.append(True))
        is_renamed = any(
            line.startswith(("rename .staging/", f"rename .checkpoint-{scenario.step}.copying"))
            and line.endswith(f" checkpoint-{scenario.step}")
            for line in storage.log[:-1]
        )
        may_be_new = bool(saved) or is_renamed
        for after in (storage.after_kill(), storage.after_power_cut("forget")):
            try:
                check_after_cut(after, scenario, may_be_new=may_be_new, must_be_new=bool(saved))
                assert [name for name in after.list("") if "copying" in name] == []
            except AssertionError as error:
                error.add_note(f"at step {step}: {storage.log[-1]}")
                raise


@EACH_DISK
@pytest.mark.parametrize("failing", [errno.ENOSPC, errno.EIO])
def test_a_copy_that_fails_leaves_everything_as_it_was(failing, disk):
    scenario = SCENARIOS["a save in place of the only checkpoint"]
    for step in range(1, steps_of(scenario, disk) + 1):
        storage = prepared(scenario, disk)
        storage.arm(fail_at=step, error=failing)
        try:
            scenario.act(storage, lambda: None)
        except OSError:
            storage.repair()
            allowed = [state_of("state at 2"), state_of("other")]
            assert newest_state(storage) in allowed, storage.log[-1]


# The same on real disks


def can_mount():
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    kinds = Path("/proc/filesystems").read_text().split()
    return {"overlay", "tmpfs"} <= set(kinds)


@contextmanager
def mounted(*command):
    done = subprocess.run(["mount", *map(str, command)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(command[-1])], check=True)


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs root, overlayfs and tmpfs")


def use(folder):
    """Do to a run with checkpoints 2, 4 and 6 all that renames; return its steps then."""
    with Checkpointer(folder, model=nn.Linear(2, 1), keep=KeepPolicy(last=2)) as run:
        assert run.resume(4).step == 4  # 6 is set aside
        run.save(4, {"other": True})  # in the place of the one that is there
        run.save(8)  # 2 is removed
    branch(RunDirectory.open_readonly(folder), "left", step=8).close()
    with Checkpointer(folder, model=nn.Linear(2, 1)) as run:
        assert run.resume().step == 8
        steps = [step for step, _ in run.run.catalog.folders()]
    set_aside = sorted(path.name for path in (folder / "set-aside").iterdir() if path.is_dir())
    left = [path.name for path in folder.rglob("*copying*")]
    assert (steps, set_aside, left) == ([4, 8], ["checkpoint-4.1", "checkpoint-6.1"], [])
    assert (folder / "branches" / "left" / "checkpoint-8" / "manifest.json").exists()


def begun(folder):
    with Checkpointer(folder, model=nn.Linear(2, 1)) as run:
        for step in (2, 4, 6):
            run.save(step)
    return folder


def test_on_one_disk_it_is_so(tmp_path):
    use(begun(tmp_path / "run"))


@needs_mounts
def test_in_a_container_whose_image_holds_the_run(tmp_path):
    begun(tmp_path / "lower" / "run")
    for name in ("upper", "work", "seen"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with mounted("-t", "overlay", "overlay", "-o", layers, tmp_path / "seen"):
        with pytest.raises(OSError, match=r"[Cc]ross-device"):
            LocalStorage(tmp_path / "seen" / "run").rename("checkpoint-2", "checkpoint-3")
        use(tmp_path / "seen" / "run")
    assert (tmp_path / "lower" / "run" / "checkpoint-2" / "manifest.json").exists()


@needs_mounts
@pytest.mark.parametrize("folder", [".staging", "set-aside", ".trash"])
def test_with_a_mount_inside_of_the_run_directory(folder, tmp_path):
    run = begun(tmp_path / "run")
    (run / folder).mkdir(exist_ok=True)
    with mounted("-t", "tmpfs", "tmpfs", run / folder):
        use(run)


def test_a_run_whose_folder_was_copied_goes_on_as_it_would(tmp_path):
    storage = Lower()
    with open_run(storage) as run:
        for step in (1, 2, 3):
            save(run.storage, step)
    storage.arm()
    with open_run(storage) as run:
        assert run.catalog.set_aside(3, "given up") == "set-aside/checkpoint-3.1"
        run.prune(KeepPolicy(last=1))
    assert [step for step, _ in run.catalog.folders()] == [2]
    assert storage.list("set-aside") == ["checkpoint-3.1", "checkpoint-3.1.txt"]
