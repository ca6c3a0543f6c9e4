"""What unbroken asks of a storage: one narrow interface, a dozen calls.

Everything that reaches a disk goes through it, so that the tests can cut the power, fill the
disk or kill the process at every single step. Paths are relative, with "/" between the parts;
"" is the root. Errors are the `OSError` that a local disk would raise.

A write is *visible* at once and *durable* (it survives a power cut) only after the right
sync: the bytes of a file after `sync` or `sync_file`, its name after `sync_folder` of the
folder that holds it.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview

COMPRESSED = ".planes"
"""What stands behind the name of a file whose bytes are kept compressed."""


@dataclass(frozen=True)
class Stat:
    """What is known of a file or folder without reading it.

    Attributes:
        nbytes: Length of the file in bytes; 0 for a folder.
        is_folder: Whether it is a folder. A symbolic link is not, wherever it points.
        modified_ns: When the bytes last changed, in nanoseconds; for telling *same* from *changed*.
        identity: Names this very file; another file under the same path has another identity.

    Example:
        >>> Stat(nbytes=4, is_folder=False, modified_ns=0, identity="8:1").nbytes
        4
    """

    nbytes: int
    is_folder: bool
    modified_ns: int
    identity: str


class Closing:
    """Mixin for what is closed when its `with` block is left."""

    def close(self) -> None:
        """Give back what it holds; closing twice is allowed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        self.close()


class Closable(Protocol):
    """Something that is closed when its `with` block is left; `Closing` makes one."""

    def close(self) -> None:
        """Give back the handle; closing twice is allowed."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...


class WriteHandle(Closable, Protocol):
    """A new file that is being written. Leaving the `with` block closes it and syncs nothing."""

    def write(self, data: Bytes, /) -> None:
        """Write all of `data` after what was written before, or raise `OSError`."""
        ...

    def sync(self) -> None:
        """Make every byte written so far durable.

        Raises:
            OSError: The bytes may be lost. Trying again would prove nothing (the kernel may
                have dropped them and report success), so this handle never syncs again.
        """
        ...


class ReadHandle(Closable, Protocol):
    """An open file. `nbytes` is its length when it was opened."""

    nbytes: int

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill the whole writable `buffer` with the bytes from `offset` on.

        Raises:
            EOFError: The file ends before the buffer is full.
            OSError: The bytes cannot be read.
        """
        ...


class Lock(Protocol):
    """A lock that this process holds until `release`, or until it ends in any way.

    Attributes:
        previous_owner: What the owner before wrote of itself, if it ended without releasing.
    """

    previous_owner: str | None

    def release(self) -> None:
        """Give the lock back; releasing twice is allowed."""
        ...

    def require_held(self) -> None:
        """Raise `LockHeldError` unless this very process still holds it; called at each commit."""
        ...


class Storage(Protocol):
    """Keeps files in folders, as a local disk does.

    `unbroken.testing.StorageContract` is this text as a test suite.
    """

    def describe(self, path: str = "") -> str:
        """Return how to call `path` in a message: "/runs/gpt2/checkpoint-10"."""
        ...

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file that did not exist; `FileExistsError` if it did. Its folder must exist.

        Args:
            path: The file.
            nbytes: How long it is going to be, if that is known. A storage may then write it in
                another way: its bytes need not be visible, and a failure need not be raised, before
                the next `sync` or `close`.
        """
        ...

    def open(self, path: str) -> ReadHandle:
        """Open a file for reading; `FileNotFoundError` if there is none. No link is followed."""
        ...

    def append(self, path: str, data: bytes) -> None:
        """Write `data` at the end of a file, which is created if missing. Durable after syncs."""
        ...

    def truncate(self, path: str, nbytes: int) -> None:
        """Cut a file to its first `nbytes` bytes; `ValueError` if it is shorter."""
        ...

    def sync_file(self, path: str) -> None:
        """Make the bytes of a file durable."""
        ...

    def make_folder(self, path: str) -> None:
        """Make a folder that did not exist; `FileExistsError` if it did. Its parent must exist."""
        ...

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable: those created, renamed and removed."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder in one atomic step; `FileExistsError` if `target` exists."""
        ...

    def link(self, source: str, target: str) -> None:
        """Give a file, which nobody may change from now on, a second name."""
        ...

    def remove_file(self, path: str) -> None:
        """Remove the name of a file; `FileNotFoundError` if there is none."""
        ...

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder; `OSError` (`ENOTEMPTY`) if it is not empty."""
        ...

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder; `FileNotFoundError` if there is none."""
        ...

    def stat(self, path: str) -> Stat | None:
        """Return what is known of a file or folder, or None if there is none."""
        ...

    def free_bytes(self) -> int | None:
        """Return how many bytes can still be written, or None where nobody knows."""
        ...

    def lock(self, path: str, owner: str) -> Lock:
        """Take the lock at `path`, and leave `owner` there for others to read.

        A process that ends in any way, SIGKILL too, no longer holds it; children that it
        forked do not keep it.

        Raises:
            LockHeldError: A live process, perhaps this one, holds it; `found` is its text.
        """
        ...


# The one rule for paths inside a storage, and the one way to open what stands at one.


def check_path(path: str) -> str:
    """Return `path` if it stays inside the root of a storage.

    Args:
        path: Relative, with "/" between the parts; "" is the root.

    Raises:
        ValueError: It is absolute, or a part of it is empty, "." or "..".

    Example:
        >>> check_path("checkpoint-10/model.safetensors")
        'checkpoint-10/model.safetensors'
    """
    if path and any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
        raise ValueError(f"{path!r}: is not a path inside the storage")
    return path


def parent_of(path: str) -> str:
    """Return the folder that holds `path`; the root holds what has no "/".

    Example:
        >>> parent_of("checkpoint-10/model.safetensors"), parent_of("run.json")
        ('checkpoint-10', '')
    """
    return path.rpartition("/")[0]


def open_regular(path: str | os.PathLike[str], flags: int, folder: int | None = None) -> int:
    """Open a regular file, and nothing else: what stands in a directory may be anybody's.

    A named pipe would wait for ever for its other end, a device may do anything, and a link leads
    elsewhere. All that is opened in a run directory, or in a folder of another program that is
    read, goes through here.

    Args:
        path: The file; its last part is not followed where it is a link.
        flags: As `os.open` takes them. The descriptor is closed in programs that are started.
        folder: The descriptor of the folder that `path` is relative to.

    Returns:
        The descriptor.

    Raises:
        OSError: It cannot be opened, or is not a regular file.

    Example:
        >>> open_regular("/dev/null", os.O_RDONLY)
        Traceback (most recent call last):
        OSError: [Errno 22] is not a regular file: '/dev/null'
    """
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(path, flags, 0o666, dir_fd=folder)
    mode = os.fstat(fd).st_mode
    if not modes.S_ISREG(mode):
        os.close(fd)
        code = errno.EISDIR if modes.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, "is not a regular file", os.fspath(path))
    return fd
