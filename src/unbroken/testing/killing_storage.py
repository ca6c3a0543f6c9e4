"""A local disk under a process that is killed with SIGKILL at the step you name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from unbroken.storage import Bytes, LocalStorage, WriteHandle
from unbroken.storage.file_lock import ProcessLock
from unbroken.storage.protocol import Closing


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
