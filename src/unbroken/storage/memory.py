"""A storage that lives in memory: for tests, examples and dry runs."""

from __future__ import annotations

import errno
import os
from typing import NoReturn, TypeAlias

from unbroken.errors import LockHeldError
from unbroken.storage.file_lock import held_error
from unbroken.storage.protocol import Bytes, Closing, Stat, WriteHandle, check_path, parent_of


class MemoryFile:
    """The bytes of a file; several names may lead to it."""

    def __init__(self, data: Bytes = b"") -> None:
        self.data = bytearray(data)
        self.changes = 0


class MemoryFolder:
    """The names in a folder, and what they lead to."""

    def __init__(self) -> None:
        self.names: dict[str, Node] = {}


Node: TypeAlias = MemoryFile | MemoryFolder


class MemoryStorage:
    """Keep files in memory, with the meaning and the errors of a local disk.

    Example:
        >>> storage = MemoryStorage()
        >>> storage.append("note.txt", b"kept")
        >>> storage.list(""), storage.stat("note.txt").nbytes
        (['note.txt'], 4)
    """

    def __init__(self) -> None:
        self._root = MemoryFolder()
        self._identities: dict[Node, int] = {}
        self._locks: dict[str, str] = {}

    def describe(self, path: str = "") -> str:
        """Return the path behind "memory:"."""
        return f"memory:{check_path(path)}"

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file that did not exist."""
        file = MemoryFile()
        self._add(path, file)
        return MemoryWriteHandle(file)

    def open(self, path: str) -> MemoryReadHandle:
        """Open a file for reading."""
        return MemoryReadHandle(self._file(path), self.describe(path))

    def append(self, path: str, data: bytes) -> None:
        """Write `data` at the end of a file, which is created if missing."""
        if self._find(path) is None:
            self._add(path, MemoryFile())
        MemoryWriteHandle(self._file(path)).write(data)

    def truncate(self, path: str, nbytes: int) -> None:
        """Cut a file to its first `nbytes` bytes."""
        file = self._file(path)
        if nbytes > len(file.data):
            raise ValueError(f"{self.describe(path)}: cannot cut {len(file.data)} to {nbytes}")
        del file.data[nbytes:]
        file.changes += 1

    def sync_file(self, path: str) -> None:
        """Check that the file exists; memory has nothing to sync."""
        self._file(path)

    def make_folder(self, path: str) -> None:
        """Make a folder that did not exist."""
        self._add(path, MemoryFolder())

    def sync_folder(self, path: str) -> None:
        """Check that the folder exists; memory has nothing to sync."""
        self._folder(path)

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder, replacing nothing."""
        node = self._need(source)
        if target.startswith(f"{source}/"):
            self._fail(errno.EINVAL, target)
        self._add(target, node)
        self._drop(source)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name."""
        self._add(target, self._file(source))

    def remove_file(self, path: str) -> None:
        """Remove the name of a file."""
        self._file(path)
        self._drop(path)

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""
        if self._folder(path).names:
            self._fail(errno.ENOTEMPTY, path)
        self._drop(path)

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder."""
        return sorted(self._folder(path).names)

    def stat(self, path: str) -> Stat | None:
        """Return what is known of a file or folder, or None."""
        node = self._find(path)
        if node is None:
            return None
        identity = str(self._identities.setdefault(node, len(self._identities)))
        if isinstance(node, MemoryFolder):
            return Stat(0, True, 0, identity)
        return Stat(len(node.data), False, node.changes, identity)

    def free_bytes(self) -> int | None:
        """Return None: nobody knows."""
        return None

    def lock(self, path: str, owner: str) -> MemoryLock:
        """Take the lock at `path`, which lasts as long as this object."""
        if path in self._locks:
            raise held_error(self.describe(path), self._locks[path])
        if self._find(path) is None:
            self._add(path, MemoryFile())
        file = self._file(path)
        lock = MemoryLock(file, self._locks, path)
        file.data[:] = owner.encode()
        self._locks[path] = owner
        return lock

    def _find(self, path: str) -> Node | None:
        node: Node = self._root
        for part in check_path(path).split("/") if path else ():
            if not isinstance(node, MemoryFolder) or part not in node.names:
                return None
            node = node.names[part]
        return node

    def _need(self, path: str) -> Node:
        node = self._find(path)
        if node is None:
            self._fail(errno.ENOENT, path)
        return node

    def _file(self, path: str) -> MemoryFile:
        node = self._need(path)
        if isinstance(node, MemoryFolder):
            self._fail(errno.EISDIR, path)
        return node

    def _folder(self, path: str) -> MemoryFolder:
        node = self._need(path)
        if isinstance(node, MemoryFile):
            self._fail(errno.ENOTDIR, path)
        return node

    def _add(self, path: str, node: Node) -> None:
        if self._find(path) is not None:
            self._fail(errno.EEXIST, path)
        self._folder(parent_of(path)).names[path.rpartition("/")[2]] = node

    def _drop(self, path: str) -> None:
        del self._folder(parent_of(path)).names[path.rpartition("/")[2]]

    def _fail(self, code: int, path: str) -> NoReturn:
        raise OSError(code, os.strerror(code), self.describe(path))


class _Handle(Closing):
    """A handle that has nothing to give back."""

    def close(self) -> None:
        """Do nothing."""


class MemoryWriteHandle(_Handle):
    """A new file in memory."""

    def __init__(self, file: MemoryFile) -> None:
        self._file = file

    def write(self, data: Bytes, /) -> None:
        """Write all of `data`."""
        self._file.data += memoryview(data).cast("B")
        self._file.changes += 1

    def sync(self) -> None:
        """Do nothing."""


class MemoryReadHandle(_Handle):
    """An open file in memory."""

    def __init__(self, file: MemoryFile, where: str) -> None:
        self._file = file
        self._where = where
        self.nbytes = len(file.data)

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        target = buffer.cast("B")
        with memoryview(self._file.data) as data:
            if offset + len(target) > len(data):
                raise EOFError(f"{self._where}: ends at byte {len(data)}")
            target[:] = data[offset : offset + len(target)]


class MemoryLock:
    """A lock in memory, made by `MemoryStorage.lock`."""

    def __init__(self, file: MemoryFile, held: dict[str, str], path: str) -> None:
        self.previous_owner = file.data.decode() or None
        self._file = file
        self._held = held
        self._path: str | None = path

    def release(self) -> None:
        """Empty the file and give the lock back."""
        if self._path is not None:
            self._file.data.clear()
            del self._held[self._path]
            self._path = None

    def require_held(self) -> None:
        """Raise if it was given back: nothing else can take it."""
        if self._path is None:
            raise LockHeldError("memory", "was given back", hint="open the run directory again")
