"""A real file system loses its power: ext4 on a loop device, shut down by its own ioctl.

This holds the model of `FaultyStorage` against a kernel. It needs root, loop devices and
mkfs.ext4, and is skipped where they are missing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from store.small_runs import newest_state, open_run, save, state_of
from unbroken.storage import LocalStorage

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN, of fs/ext4/ext4.h
HOW = {"the journal is written first": 1, "nothing more is written": 2}


def can_mount() -> bool:
    tools = all(map(shutil.which, ("mkfs.ext4", "mount", "umount")))
    return tools and os.geteuid() == 0 and Path("/dev/loop-control").exists()


pytestmark = pytest.mark.skipif(not can_mount(), reason="needs root, loop devices and mkfs.ext4")


class Disk:
    """An ext4 file system in a file."""

    def __init__(self, folder: Path) -> None:
        self.image, self.place = folder / "disk.img", folder / "mounted"
        self.place.mkdir()
        with self.image.open("wb") as file:
            file.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.place)], check=True)
        try:
            yield self.place / "run"
        finally:
            subprocess.run(["umount", str(self.place)], check=True)

    def cut_power(self, how: int) -> None:
        fd = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", how))
        finally:
            os.close(fd)


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


def newest_after_cut(disk: Disk, storage_class: type[LocalStorage], how: int) -> object:
    """Save a second checkpoint, cut the power as soon as the save returned, and look."""
    with disk.mounted() as place:
        with open_run(LocalStorage(place)):
            save(LocalStorage(place), 1)
        os.sync()
        save(storage_class(place), 2)
        disk.cut_power(how)
    with disk.mounted() as place:
        return newest_state(LocalStorage(place))


@pytest.mark.parametrize("how", HOW.values(), ids=list(HOW))
def test_a_save_that_returned_survives_a_real_power_cut(disk, how):
    assert newest_after_cut(disk, LocalStorage, how) == state_of("state at 2")


class SyncsNothing(LocalStorage):
    def sync_folder(self, path):
        pass

    def create(self, path, nbytes=0):
        handle = super().create(path, nbytes)
        handle.sync = lambda: None
        return handle


@pytest.mark.parametrize("how", HOW.values(), ids=list(HOW))
def test_a_save_without_syncs_does_not(disk, how):
    assert newest_after_cut(disk, SyncsNothing, how) == state_of("state at 1")
