"""Storages that fail: at a chosen call, by a power cut, or with the whole process."""

from __future__ import annotations

import errno as errors
import os
import random
import signal
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from unbroken.storage import Bytes, LocalStorage, MemoryStorage, Stat, WriteHandle
from unbroken.storage.file_lock import ProcessLock
from unbroken.storage.memory import (
    MemoryFile,
    MemoryFolder,
    MemoryLock,
    MemoryReadHandle,
    MemoryWriteHandle,
    Node,
)
from unbroken.storage.protocol import Closing

PowerCutMode: TypeAlias = Literal["forget", "names", "zeros", "some"]
POWER_CUT_MODES: tuple[PowerCutMode, ...] = ("forget", "names", "zeros", "some")

Content: TypeAlias = "Mapping[str, bytes | Content]"
_View: TypeAlias = "dict[str, MemoryFile | _View]"
_TAKES_ROOM = {"create", "write", "append", "make_folder", "link"}
_BLOCK = 4096


class PowerCut(BaseException):
    """The power went out, or the process was killed, at the step asked for."""


class FaultyStorage(MemoryStorage):
    """A disk in memory that is cut off, or fails, at one chosen step.

    Every mutating call, every written chunk and every sync is one step, counted from 1.

    Args:
        cut_at: Before this step `PowerCut` is raised; if the step is a write, half of it is
            done. Every later call raises `PowerCut` too: the process is dead.
        fail_at: At this step `OSError` is raised; of a write, half is done. A file whose sync
            failed is never durable again, though later syncs succeed, as on Linux.
        error: The `errno` of that failure.
        lasting: From then on everything that takes room fails too, until `repair`.

    Attributes:
        steps: How many steps were taken.
        log: What each of them was: "write checkpoint-1/state.json".

    Example:
        >>> disk = FaultyStorage(cut_at=3)
        >>> try:
        ...     with disk.create("a") as file:
        ...         file.write(b"bytes")
        ...         file.sync()
        ... except PowerCut:
        ...     pass
        >>> disk.after_kill().list(""), disk.after_power_cut("forget").list("")
        (['a'], [])
    """

    def __init__(
        self,
        *,
        cut_at: int | None = None,
        fail_at: int | None = None,
        error: int = errors.EIO,
        lasting: bool = False,
    ) -> None:
        super().__init__()
        self.steps = 0
        self.log: list[str] = []
        self._cut_at = cut_at
        self._fail_at = fail_at
        self._error = error
        self._lasting = lasting
        self._is_dead = False
        self._is_full = False
        self._durable_bytes: dict[MemoryFile, bytes] = {}
        self._durable_names: dict[MemoryFolder, dict[str, Node]] = {}
        self._dirty_for_ever: set[MemoryFile] = set()
        self._past_names: list[_View] = []  # after each change of a name since the last sync

    def repair(self) -> None:
        """Make room again, or mend what failed."""
        self._is_full = False

    def arm(
        self,
        *,
        cut_at: int | None = None,
        fail_at: int | None = None,
        error: int = errors.EIO,
        lasting: bool = False,
    ) -> None:
        """Count the steps from 1 again, and fail at another one."""
        self.steps = 0
        self.log.clear()
        self._cut_at, self._fail_at = cut_at, fail_at
        self._error, self._lasting = error, lasting

    def fill(self, content: Content, folder: str = "") -> None:
        """Put files and folders on the disk, durably and without a step."""
        for name, item in content.items():
            path = f"{folder}/{name}" if folder else name
            if isinstance(item, bytes):
                self._add(path, MemoryFile(item))
                self._durable_bytes[self._file(path)] = item
            else:
                self._add(path, MemoryFolder())
                self.fill(item, path)
        self._durable_names[self._folder(folder)] = dict(self._folder(folder).names)

    def after_kill(self) -> FaultyStorage:
        """Return the disk as the next process finds it after a SIGKILL: nothing is lost."""
        return _disk_of(self._volatile_view(), lambda file: bytes(file.data))

    def after_power_cut(self, mode: PowerCutMode, seed: int = 0) -> FaultyStorage:
        """Return the disk as the next boot finds it.

        Args:
            mode: "forget": what was not synced is gone. "names": all names are there, of the
                bytes only the synced ones, so that new files are empty. "zeros": all names and
                sizes are there, bytes that were not synced are zero. "some": the names as they
                were at some moment since the last sync of a folder, and of each file each block
                synced, zero or new, drawn from `seed`.
            seed: Chooses among the many disks that "some" can leave.
        """
        if mode == "forget":
            return _disk_of(self._durable_view(self._root), self._synced)
        if mode == "names":
            return _disk_of(self._volatile_view(), self._synced)
        if mode == "zeros":
            return _disk_of(self._volatile_view(), self._zeroed)
        draw = random.Random(seed)  # noqa: S311
        moments = [*self._past_names, self._volatile_view()]
        return _disk_of(draw.choice(moments), lambda file: self._mixed(file, draw))

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file; its name is volatile."""
        self._step("create", path)
        super().create(path, nbytes)
        self._names_changed()
        return _FaultyWriteHandle(self, self._file(path), path)

    def open(self, path: str) -> MemoryReadHandle:
        """Open a file for reading, as it is in the volatile view."""
        self._refuse_the_dead()
        return super().open(path)

    def append(self, path: str, data: bytes) -> None:
        """Append; a cut or failing step leaves half of the bytes."""
        self._step("append", path, lambda: MemoryStorage.append(self, path, _half(data)))
        super().append(path, data)
        self._names_changed()

    def truncate(self, path: str, nbytes: int) -> None:
        """Truncate; volatile."""
        self._step("truncate", path)
        super().truncate(path, nbytes)

    def sync_file(self, path: str) -> None:
        """Make the bytes of a file durable."""
        self.sync(self._file(path), path)

    def sync(self, file: MemoryFile, path: str) -> None:
        """Make the bytes of an open file durable."""
        self._step("sync_file", path, lambda: self._dirty_for_ever.add(file))
        if file not in self._dirty_for_ever:
            self._durable_bytes[file] = bytes(file.data)

    def write(self, file: MemoryFile, path: str, data: Bytes) -> None:
        """Write to an open file; a cut or failing step leaves half of the bytes."""
        handle = MemoryWriteHandle(file)
        self._step("write", path, lambda: handle.write(_half(data)))
        handle.write(data)

    def make_folder(self, path: str) -> None:
        """Make a folder; its name is volatile."""
        self._step("make_folder", path)
        super().make_folder(path)
        self._names_changed()

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        self._step("sync_folder", path)
        folder = self._folder(path)
        self._durable_names[folder] = dict(folder.names)
        self._past_names.clear()

    def rename(self, source: str, target: str) -> None:
        """Rename; volatile."""
        self._step("rename", f"{source} {target}")
        super().rename(source, target)
        self._names_changed()

    def link(self, source: str, target: str) -> None:
        """Link; volatile."""
        self._step("link", f"{source} {target}")
        super().link(source, target)
        self._names_changed()

    def remove_file(self, path: str) -> None:
        """Remove a file; volatile."""
        self._step("remove_file", path)
        super().remove_file(path)
        self._names_changed()

    def remove_folder(self, path: str) -> None:
        """Remove a folder; volatile."""
        self._step("remove_folder", path)
        super().remove_folder(path)
        self._names_changed()

    def list(self, path: str) -> list[str]:
        """List the volatile names."""
        self._refuse_the_dead()
        return super().list(path)

    def stat(self, path: str) -> Stat | None:
        """Look at the volatile view."""
        self._refuse_the_dead()
        return super().stat(path)

    def lock(self, path: str, owner: str) -> MemoryLock:
        """Take a lock; that writes the owner's text, and is a step."""
        self._step("lock", path)
        return super().lock(path, owner)

    def _step(self, call: str, path: str, half_done: Callable[[], object] = lambda: None) -> None:
        self._refuse_the_dead()
        self.steps += 1
        self.log.append(f"{call} {path}")
        if self.steps == self._cut_at:
            if call != "sync_file":
                half_done()
            self._is_dead = True
            raise PowerCut(f"step {self.steps}: {self.log[-1]}")
        if self.steps == self._fail_at:
            self._is_full = self._lasting
            half_done()
            raise OSError(self._error, os.strerror(self._error), self.describe(path))
        if self._is_full and call in _TAKES_ROOM:
            raise OSError(self._error, os.strerror(self._error), self.describe(path))

    def _refuse_the_dead(self) -> None:
        if self._is_dead:
            raise PowerCut("the process is dead")

    def _names_changed(self) -> None:
        self._past_names.append(self._volatile_view())

    def _volatile_view(self) -> _View:
        return _view_of(self._root)

    def _durable_view(self, folder: MemoryFolder) -> _View:
        names = self._durable_names.get(folder, {})
        return {
            name: self._durable_view(node) if isinstance(node, MemoryFolder) else node
            for name, node in names.items()
        }

    def _synced(self, file: MemoryFile) -> bytes:
        return self._durable_bytes.get(file, b"")

    def _zeroed(self, file: MemoryFile) -> bytes:
        return self._synced(file)[: len(file.data)].ljust(len(file.data), b"\0")

    def _mixed(self, file: MemoryFile, draw: random.Random) -> bytes:
        synced, zeroed, new = self._synced(file), self._zeroed(file), bytes(file.data)
        if draw.random() < 0.5:
            return draw.choice([synced, zeroed, new])
        return b"".join(
            draw.choice([zeroed, new])[start : start + _BLOCK]
            for start in range(0, len(new), _BLOCK)
        )


class _FaultyWriteHandle(MemoryWriteHandle):
    """A new file on a faulty disk."""

    def __init__(self, disk: FaultyStorage, file: MemoryFile, path: str) -> None:
        super().__init__(file)
        self._disk = disk
        self._path = path

    def write(self, data: Bytes, /) -> None:
        """Write as one step."""
        self._disk.write(self._file, self._path, data)

    def sync(self) -> None:
        """Sync as one step."""
        self._disk.sync(self._file, self._path)


def _half(data: Bytes) -> bytes:
    return bytes(data[: len(data) // 2])


def _view_of(folder: MemoryFolder) -> _View:
    return {
        name: _view_of(node) if isinstance(node, MemoryFolder) else node
        for name, node in folder.names.items()
    }


def _disk_of(view: _View, bytes_of: Callable[[MemoryFile], bytes]) -> FaultyStorage:
    disk = FaultyStorage()
    disk.fill(_content_of(view, bytes_of))
    return disk


def _content_of(view: _View, bytes_of: Callable[[MemoryFile], bytes]) -> Content:
    return {
        name: _content_of(item, bytes_of) if isinstance(item, dict) else bytes_of(item)
        for name, item in view.items()
    }


# A local disk under a process that is killed with SIGKILL at the step you name.


class KillingStorage(LocalStorage):
    """A `LocalStorage` that kills its own process before one chosen step.

    Every mutating call, every written chunk and every sync is one step, counted from 1. Of a
    write or an append, half is done first. Use it in a forked child.

    Args:
        root: The folder.
        kill_at: The step; None kills at none, and only counts.

    Attributes:
        steps: How many steps were taken.

    Example:
        >>> import os, signal, tempfile
        >>> root = tempfile.mkdtemp()
        >>> child = os.fork()
        >>> if child == 0:
        ...     KillingStorage(root, kill_at=1).make_folder("never")
        >>> os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, os.listdir(root)
        (True, [])
    """

    def __init__(self, root: str | os.PathLike[str], *, kill_at: int | None = None) -> None:
        super().__init__(root)
        self.steps = 0
        self._kill_at = kill_at

    def step(self, half_done: Callable[[], object] = lambda: None) -> None:
        """Count a step, and end the process if it is the one."""
        self.steps += 1
        if self.steps == self._kill_at:
            half_done()
            os.kill(os.getpid(), signal.SIGKILL)

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file."""
        self.step()
        return _KillingWriteHandle(self, super().create(path, nbytes))

    def append(self, path: str, data: bytes) -> None:
        """Append; a kill leaves half of the bytes."""
        self.step(lambda: LocalStorage.append(self, path, data[: len(data) // 2]))
        super().append(path, data)

    def truncate(self, path: str, nbytes: int) -> None:
        """Truncate a file."""
        self.step()
        super().truncate(path, nbytes)

    def sync_file(self, path: str) -> None:
        """Sync a file."""
        self.step()
        super().sync_file(path)

    def make_folder(self, path: str) -> None:
        """Make a folder."""
        self.step()
        super().make_folder(path)

    def sync_folder(self, path: str) -> None:
        """Sync a folder."""
        self.step()
        super().sync_folder(path)

    def rename(self, source: str, target: str) -> None:
        """Rename a file or folder."""
        self.step()
        super().rename(source, target)

    def link(self, source: str, target: str) -> None:
        """Link a file."""
        self.step()
        super().link(source, target)

    def remove_file(self, path: str) -> None:
        """Remove a file."""
        self.step()
        super().remove_file(path)

    def remove_folder(self, path: str) -> None:
        """Remove a folder."""
        self.step()
        super().remove_folder(path)

    def lock(self, path: str, owner: str) -> ProcessLock:
        """Take a lock; that writes the owner's text."""
        self.step()
        return super().lock(path, owner)


class _KillingWriteHandle(Closing):
    """A new file; each write and each sync is a step."""

    def __init__(self, storage: KillingStorage, inner: WriteHandle) -> None:
        self._storage = storage
        self._inner = inner

    def write(self, data: Bytes, /) -> None:
        """Write; a kill leaves half of the bytes."""
        self._storage.step(lambda: self._inner.write(data[: len(data) // 2]))
        self._inner.write(data)

    def sync(self) -> None:
        """Sync the file."""
        self._storage.step()
        self._inner.sync()

    def close(self) -> None:
        """Close the file."""
        self._inner.close()
