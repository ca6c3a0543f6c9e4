"""A lock on a file that belongs to one process and dies with it.

POSIX record locks (`fcntl.lockf`), not `flock`: a flock belongs to the open file, which forked
data-loading workers inherit, so that they would keep it alive after the trainer was killed.
Record locks have two traps, both handled here. They do not exclude the process from itself:
a registry does. And they are dropped when the process closes *any* descriptor of the file: the
registry is asked before the file is opened, and no other code opens it.
"""

from __future__ import annotations

import errno
import fcntl
import os

from unbroken.errors import LockHeldError

_MAX_OWNER_BYTES = 4096
_held: dict[tuple[int, int, int], str] = {}  # (pid, device, inode) -> owner


class ProcessLock:
    """A lock on a local file, made by `take_process_lock`."""

    def __init__(self, fd: int, key: tuple[int, int, int], previous_owner: str | None) -> None:
        self._fd = fd
        self._key = key
        self._is_released = False
        self.previous_owner = previous_owner

    def release(self) -> None:
        """Empty the file and give the lock back. In a forked child this does nothing."""
        # A child inherits this object, not the lock: the text and the lock are its parent's.
        if self._key[0] != os.getpid() or self._is_released:
            return
        self._is_released = True
        del _held[self._key]
        try:
            os.ftruncate(self._fd, 0)
        finally:
            os.close(self._fd)


def take_process_lock(path: str, owner: str) -> ProcessLock:
    """Lock the file at `path`, which is created if missing and never removed.

    Raises:
        LockHeldError: A live process holds it, this one included.
        OSError: The file cannot be opened, or the file system has no locks.
    """
    _refuse_if_held_here(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _lock_or_raise(fd, path)
        previous = _read_owner(fd)
        _write_owner(fd, owner)
    except BaseException:
        os.close(fd)
        raise
    key = _key_of(os.fstat(fd))
    _held[key] = owner
    return ProcessLock(fd, key, previous)


def _key_of(found: os.stat_result) -> tuple[int, int, int]:
    return (os.getpid(), found.st_dev, found.st_ino)


def _refuse_if_held_here(path: str) -> None:
    try:
        key = _key_of(os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return
    if key in _held:
        raise held_error(path, _held[key])


def _lock_or_raise(fd: int, path: str) -> None:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise held_error(path, _read_owner(fd) or "an owner that left no name") from None


def held_error(where: str, owner: str) -> LockHeldError:
    """Return the error that says who holds the lock at `where`."""
    hint = "stop that process first, or choose another run directory"
    return LockHeldError(where, "is locked by a live process", found=owner, hint=hint)


def _read_owner(fd: int) -> str | None:
    return os.pread(fd, _MAX_OWNER_BYTES, 0).decode("utf-8", "replace") or None


def _write_owner(fd: int, owner: str) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, owner.encode()[:_MAX_OWNER_BYTES], 0)
    os.fsync(fd)
