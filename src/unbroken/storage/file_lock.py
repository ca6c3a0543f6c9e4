"""A lock on a file that belongs to one process and dies with it.

On Linux it is an open file description lock (`F_OFD_SETLK`), which only its own descriptor can
lose. A record lock (`fcntl.lockf`) is dropped when anything in the process closes the file: a
copy of the directory, an archive, an uploader. The two exclude each other, and both work on
network disks. A forked child inherits the descriptor, and would keep the lock alive after its
parent was killed: each one closes it first of all. Elsewhere a record lock is taken, and is
asked for again at each `require_held`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import threading

from unbroken.errors import LockHeldError
from unbroken.storage.protocol import open_regular

_MAX_OWNER_BYTES = 4096
_F_OFD_SETLK = 37  # Linux; Python 3.11 does not name it
_HAS_OFD_LOCKS = sys.platform == "linux" and sys.maxsize > 1 << 32
_WHOLE_FILE = (os.SEEK_SET, 0, 0, 0)  # from where, the first byte, how many, no process

_held: dict[tuple[int, int, int], str] = {}  # (pid, device, inode) -> owner
_descriptors: set[int] = set()
_forking = threading.Lock()  # no fork between the opening of a descriptor and its entry


class ProcessLock:
    """A lock on a local file, made by `take_process_lock`."""

    def __init__(self, path: str, owner: str, fd: int, previous_owner: str | None) -> None:
        self.previous_owner = previous_owner
        self._path = path
        self._owner = owner
        self._text = _text_of(owner).decode("utf-8", "replace")
        self._fd = fd
        self._key = _key_of(os.fstat(fd))
        self._is_released = False
        _held[self._key] = owner

    def release(self) -> None:
        """Empty the file and give the lock back. In a forked child this does nothing."""
        # A child inherits this object, not the lock: the text and the lock are its parent's.
        if self._key[0] != os.getpid() or self._is_released:
            return
        self._is_released = True
        del _held[self._key]
        try:
            os.ftruncate(self._fd, 0)
            _set_lock(self._fd, fcntl.F_UNLCK)  # what a library has forked may hold it open
        finally:
            _close(self._fd)

    def require_held(self) -> None:
        """Raise if this process does not hold the lock any more; take it again if it is free.

        Raises:
            LockHeldError: Another process holds it, has held it, or made this object.
            OSError: The file cannot be read.
        """
        if self._key[0] != os.getpid():
            what = "is locked by the process that this one was forked from"
            hint = "save there; or open the run directory in the process that is to save"
            raise LockHeldError(self._path, what, found=self._owner, hint=hint)
        if self._is_released:
            raise LockHeldError(self._path, "was given back", hint="open the run directory again")
        try:
            found = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            self._take_again()
            return
        if _key_of(found) != self._key:
            raise _lost(self._path, "another file in its place")
        _lock_or_raise(self._fd, self._path)
        owner = _read_owner(self._fd) or ""
        if owner != self._text:
            raise _lost(self._path, owner or "an owner that has given it back")

    def _take_again(self) -> None:
        """Lock a new file where somebody removed ours: each start since would have made one."""
        new = take_process_lock(self._path, self._owner)
        _held.pop(self._key)
        _close(self._fd)
        self._fd, self._key = new._fd, new._key  # noqa: SLF001 (of its own class)


def take_process_lock(path: str, owner: str) -> ProcessLock:
    """Lock the file at `path`, which is created if missing and never removed.

    Raises:
        LockHeldError: A live process holds it, this one included.
        OSError: The file cannot be opened, or the file system has no locks.
    """
    _refuse_if_held_here(path)
    with _forking:
        fd = open_regular(path, os.O_RDWR | os.O_CREAT)
        _descriptors.add(fd)
    try:
        _lock_or_raise(fd, path)
        previous = _read_owner(fd)
        _write_owner(fd, owner)
        return ProcessLock(path, owner, fd, previous)
    except BaseException:
        _close(fd)
        raise


def _close(fd: int) -> None:
    _descriptors.discard(fd)
    os.close(fd)


def _close_in_child() -> None:
    _forking.release()
    for fd in _descriptors:
        os.close(fd)
    _descriptors.clear()


os.register_at_fork(
    before=_forking.acquire,
    after_in_parent=_forking.release,
    after_in_child=_close_in_child,
)


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
        _set_lock(fd, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise held_error(path, _read_owner(fd) or "an owner that left no name") from None


def _set_lock(fd: int, kind: int) -> None:
    if _HAS_OFD_LOCKS:
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, struct.pack("hhqqi4x", kind, *_WHOLE_FILE))
        except OSError as error:
            if error.errno != errno.EINVAL:  # which says: no such command here
                raise
        else:
            return
    fcntl.lockf(fd, fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB)


def held_error(where: str, owner: str) -> LockHeldError:
    """Return the error that says who holds the lock at `where`."""
    hint = "stop that process first, or choose another run directory"
    return LockHeldError(where, "is locked by a live process", found=owner, hint=hint)


def _lost(where: str, found: str) -> LockHeldError:
    what = "does not belong to this process any more"
    hint = "nothing was saved: another process may train there; look at what it made"
    return LockHeldError(where, what, found=found, hint=hint)


def _read_owner(fd: int) -> str | None:
    return os.pread(fd, _MAX_OWNER_BYTES, 0).decode("utf-8", "replace") or None


def _write_owner(fd: int, owner: str) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, _text_of(owner), 0)
    os.fsync(fd)


def _text_of(owner: str) -> bytes:
    return owner.encode()[:_MAX_OWNER_BYTES]
