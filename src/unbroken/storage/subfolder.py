"""A folder of a storage, as a storage of its own."""

from __future__ import annotations

from unbroken.storage.protocol import Lock, ReadHandle, Stat, Storage, WriteHandle, check_path


class FolderStorage:
    """Keep files below a folder of another storage; it can do what that one can.

    Args:
        inner: The other storage.
        folder: A path in it; "" is all of it. It need not exist, and is not made.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> disk = MemoryStorage()
        >>> disk.make_folder("branches")
        >>> FolderStorage(disk, "branches").append("note.txt", b"kept")
        >>> disk.list("branches")
        ['note.txt']
    """

    def __init__(self, inner: Storage, folder: str) -> None:
        self._inner = inner
        self._folder = check_path(folder)

    def _below(self, path: str) -> str:
        if not self._folder:
            return check_path(path)
        return f"{self._folder}/{check_path(path)}" if path else self._folder

    def describe(self, path: str = "") -> str:
        """Return how the other storage calls the path."""
        return self._inner.describe(self._below(path))

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file that did not exist."""
        return self._inner.create(self._below(path), nbytes)

    def open(self, path: str) -> ReadHandle:
        """Open a file for reading."""
        return self._inner.open(self._below(path))

    def append(self, path: str, data: bytes) -> None:
        """Write `data` at the end of a file, which is created if missing."""
        self._inner.append(self._below(path), data)

    def truncate(self, path: str, nbytes: int) -> None:
        """Cut a file to its first `nbytes` bytes."""
        self._inner.truncate(self._below(path), nbytes)

    def sync_file(self, path: str) -> None:
        """Make the bytes of a file durable."""
        self._inner.sync_file(self._below(path))

    def make_folder(self, path: str) -> None:
        """Make a folder that did not exist."""
        self._inner.make_folder(self._below(path))

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        self._inner.sync_folder(self._below(path))

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder in one atomic step, replacing nothing."""
        self._inner.rename(self._below(source), self._below(target))

    def link(self, source: str, target: str) -> None:
        """Give a file a second name."""
        self._inner.link(self._below(source), self._below(target))

    def remove_file(self, path: str) -> None:
        """Remove the name of a file."""
        self._inner.remove_file(self._below(path))

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""
        self._inner.remove_folder(self._below(path))

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder."""
        return self._inner.list(self._below(path))

    def stat(self, path: str) -> Stat | None:
        """Return what is known of a file or folder, or None."""
        return self._inner.stat(self._below(path))

    def free_bytes(self) -> int | None:
        """Return how many bytes the other storage can still take."""
        return self._inner.free_bytes()

    def lock(self, path: str, owner: str) -> Lock:
        """Take the lock at `path`."""
        return self._inner.lock(self._below(path), owner)
