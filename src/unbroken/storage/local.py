"""Files and folders on a local disk (or anything mounted as one)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat as modes
from collections.abc import Callable, Iterator
from functools import cache

from unbroken.storage.direct_io import LongRead, LongWrite, aligned_buffer
from unbroken.storage.file_lock import ProcessLock, take_process_lock
from unbroken.storage.protocol import (
    COMPRESSED,
    Bytes,
    Closing,
    Stat,
    Storage,
    WriteHandle,
    check_path,
    open_regular,
)

# Rename that never replaces anything, atomically where the system can.
#
# POSIX rename() replaces a file, or an empty folder, without a word. Linux has had
# renameat2(RENAME_NOREPLACE) since 3.15; Python does not wrap it.


_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def rename_no_replace(
    source: str, target: str, source_folder: int | None = None, target_folder: int | None = None
) -> None:
    """Rename `source` to `target` in one step, unless `target` exists.

    Where the system or the file system has no such call, existence is checked first; then
    another process may slip in between, which the lock on a run directory rules out.

    Args:
        source: The old name.
        target: The new one.
        source_folder: The open folder that `source` is a name in; None: it is a path.
        target_folder: The same of `target`.

    Raises:
        FileExistsError: `target` exists, be it an empty folder.
        OSError: As `os.rename`.
    """
    call = _renameat2()
    if call is not None:
        folders = [_AT_FDCWD if one is None else one for one in (source_folder, target_folder)]
        code = call(folders[0], os.fsencode(source), folders[1], os.fsencode(target))
        if code == 0:
            return
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), source, None, target)
    if _is_there(target, target_folder):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), source, None, target)
    os.rename(source, target, src_dir_fd=source_folder, dst_dir_fd=target_folder)


def _is_there(name: str, folder: int | None) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@cache
def _renameat2() -> Callable[[int, bytes, int, bytes], int] | None:
    import ctypes  # here: only those who write pay for it

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return None

    def call(source_folder: int, source: bytes, target_folder: int, target: bytes) -> int:
        failed: int = function(source_folder, source, target_folder, target, _RENAME_NOREPLACE)
        return ctypes.get_errno() if failed else 0

    return call


_MAX_CALL_BYTES = 64 << 20  # of one read or write; Linux itself stops at 2 GiB
_LONG_BYTES = 1 << 20  # shorter files, and shorter reads, go through the page cache
_BUFFER_BYTES = 4 << 20
_BUFFERS = 4  # of one file that is being written
_FULL_SYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync stops at the drive
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LINK = "is a symbolic link, which is not followed inside of a run directory"


class LocalStorage:
    """Keep files below a folder of the local disk. Durable means fsync.

    Long files are written and read past the page cache where the file system allows it.
    No symbolic link below the root is followed: every folder on the way is opened as the folder
    that it is, and names are looked up in it. The root itself may be a link.

    Args:
        root: The folder. It is made, with its parents and durably, unless `create` is False.
        create: Whether to make it; False touches nothing, for those who only read.

    Raises:
        OSError: The folder cannot be made; `FileExistsError` if a file stands there.

    Example:
        >>> import tempfile
        >>> storage = LocalStorage(tempfile.mkdtemp() + "/runs/gpt2")
        >>> with storage.create("note.txt") as file:
        ...     file.write(b"kept")
        ...     file.sync()
        >>> storage.list("")
        ['note.txt']
    """

    def __init__(self, root: str | os.PathLike[str], *, create: bool = True) -> None:
        self._root = os.path.abspath(root)
        self._buffers = Buffers()
        if create:
            _make_folder_durably(self._root)

    def describe(self, path: str = "") -> str:
        """Return the absolute path."""
        return os.path.join(self._root, check_path(path)) if path else self._root

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file that did not exist; a long one is written past the page cache."""
        fd = self._open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        if nbytes < _LONG_BYTES:
            return LocalWriteHandle(self.describe(path), fd)
        return LongWriteHandle(self.describe(path), fd, nbytes, self._buffers)

    def open(self, path: str) -> LocalReadHandle:
        """Open a regular file for reading; a link or a device is refused."""
        return LocalReadHandle(self.describe(path), self._open(path, os.O_RDONLY), self._buffers)

    def append(self, path: str, data: bytes) -> None:
        """Write `data` at the end of a file, which is created if missing."""
        fd = self._open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with LocalWriteHandle(self.describe(path), fd) as file:
            file.write(data)

    def truncate(self, path: str, nbytes: int) -> None:
        """Cut a file to its first `nbytes` bytes."""
        with _closing(self._open(path, os.O_WRONLY), self.describe(path)) as fd:
            found = os.fstat(fd).st_size
            if nbytes > found:
                raise ValueError(f"{self.describe(path)}: cannot cut {found} bytes to {nbytes}")
            os.ftruncate(fd, nbytes)

    def sync_file(self, path: str) -> None:
        """Make the bytes of a file durable."""
        with _closing(self._open(path, os.O_RDONLY), self.describe(path)) as fd:
            _sync(fd)

    def make_folder(self, path: str) -> None:
        """Make a folder that did not exist."""
        with self._at(path) as (folder, name):
            os.mkdir(name, dir_fd=folder)

    def sync_folder(self, path: str) -> None:
        """Make the names in a folder durable."""
        with _closing(self._open_folder(path), self.describe(path)) as fd:
            _sync(fd)

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder in one atomic step, replacing nothing."""
        with self._at(source) as (source_folder, old), self._at(target) as (target_folder, new):
            rename_no_replace(old, new, source_folder, target_folder)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name (a hard link)."""
        with self._at(source) as (folder, old), self._at(target) as (target_folder, new):
            os.link(old, new, src_dir_fd=folder, dst_dir_fd=target_folder, follow_symlinks=False)

    def remove_file(self, path: str) -> None:
        """Remove the name of a file."""
        with self._at(path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def remove_folder(self, path: str) -> None:
        """Remove an empty folder."""
        with self._at(path) as (folder, name):
            os.rmdir(name, dir_fd=folder)

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder."""
        with _closing(self._open_folder(path), self.describe(path)) as fd:
            return sorted(os.listdir(fd))

    def stat(self, path: str) -> Stat | None:
        """Return what is known of a file or folder, or None; a link is not followed."""
        try:
            with self._at(path) as (folder, name):
                found = os.stat(name, dir_fd=folder, follow_symlinks=not path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:  # behind a link there is nothing of ours
                return None
            raise
        is_folder = modes.S_ISDIR(found.st_mode)
        nbytes = 0 if is_folder else found.st_size
        return Stat(nbytes, is_folder, found.st_mtime_ns, f"{found.st_dev}:{found.st_ino}")

    @contextlib.contextmanager
    def _at(self, path: str) -> Iterator[tuple[int | None, str]]:
        """Give the open folder that holds a path, and the path's name in it.

        What is directly in the root needs no open folder.
        """
        where = self.describe(path)
        if "/" not in path:
            yield None, where
            return
        parent, _, name = path.rpartition("/")
        folder = self._open_folder(parent)
        try:
            yield folder, name
        except OSError as error:
            error.filename = where
            raise
        finally:
            os.close(folder)

    def _open_folder(self, path: str) -> int:
        """Open a folder, each one on the way to it as the folder that it is."""
        parts = check_path(path).split("/") if path else []
        fd, done = os.open(self._root, _FOLDER_FLAGS), ""
        for name in parts:
            done = f"{done}/{name}" if done else name
            try:
                below = os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=fd)
            except OSError as error:
                raise _seen(error, self.describe(done)) from None
            finally:
                os.close(fd)
            fd = below
        return fd

    def _open(self, path: str, flags: int) -> int:
        with self._at(path) as (folder, name):
            try:
                return open_regular(name, flags, folder)
            except OSError as error:
                raise _seen(error, self.describe(path)) from None

    def free_bytes(self) -> int:
        """Return how many bytes this user can still write."""
        found = os.statvfs(self._root)
        return found.f_bavail * found.f_frsize

    def lock(self, path: str, owner: str) -> ProcessLock:
        """Take the lock at `path` for this process."""
        with self._at(path):  # a link on the way is refused
            pass
        return take_process_lock(self.describe(path), owner)


class Buffers:
    """Memory for reading and writing long files, used again: fresh memory is slow."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def take(self) -> memoryview:
        """Return a buffer that nobody else uses."""
        try:
            return self._free.pop()
        except IndexError:
            return aligned_buffer(_BUFFER_BYTES)

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back."""
        self._free.append(buffer)


class _Handle(Closing):
    """An open descriptor that is closed once."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    def close(self) -> None:
        """Close the descriptor; closing twice is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with _naming(self._path):  # quotas and network disks may complain only here
                os.close(fd)


class LocalWriteHandle(_Handle):
    """A local file that grows at its end, made by `LocalStorage.create`."""

    _failed: OSError | None = None

    def write(self, data: Bytes, /) -> None:
        """Write all of `data`, in as many calls as the system wants."""
        rest = memoryview(data).cast("B")
        while len(rest) > 0:
            with _naming(self._path):
                written = os.write(self._fd, rest[:_MAX_CALL_BYTES])
            rest = rest[written:]

    def sync(self) -> None:
        """Make every byte written so far durable; after a failure, fail for ever.

        Linux marks the pages of a failed fsync clean and reports success the next time
        (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).
        """
        if self._failed is not None:
            raise OSError(self._failed.errno, "an earlier write or fsync of it failed", self._path)
        try:
            with _naming(self._path):
                _sync(self._fd)
        except OSError as error:
            self._failed = error
            raise


class LongWriteHandle(LocalWriteHandle):
    """A new local file of known length, made by `LocalStorage.create`."""

    def __init__(self, path: str, fd: int, nbytes: int, buffers: Buffers) -> None:
        super().__init__(path, fd)
        self._buffers = buffers
        self._long: LongWrite | None = None
        try:
            with self._remembering():
                self._long = LongWrite(self._fd, nbytes, [buffers.take() for _ in range(_BUFFERS)])
        except OSError:
            self.close()
            raise

    def write(self, data: Bytes, /) -> None:
        """Take all of `data`; what the device says of it may come with a later call."""
        with self._remembering():
            self._open_long().write(data)

    def sync(self) -> None:
        """Make every byte written so far durable; after any failure, fail for ever."""
        if self._failed is None:
            with self._remembering():
                self._open_long().finish()
        super().sync()

    def close(self) -> None:
        """Write what is left, and close the descriptor."""
        long, self._long = self._long, None
        try:
            if long is not None and self._failed is None:
                with self._remembering():
                    long.finish()
        finally:
            if long is not None:
                for buffer in long.close():
                    self._buffers.give(buffer)
            super().close()

    def _open_long(self) -> LongWrite:
        if self._long is None:
            raise OSError(errno.EBADF, "the file is closed", self._path)
        return self._long

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        """Note a failure: what a later sync would say of these bytes means nothing."""
        try:
            with _naming(self._path):
                yield
        except OSError as error:
            self._failed = error
            raise


class LocalReadHandle(_Handle):
    """An open local file, made by `LocalStorage.open`."""

    def __init__(self, path: str, fd: int, buffers: Buffers) -> None:
        super().__init__(path, fd)
        self._buffers = buffers
        self._long: LongRead | None = None
        self.nbytes = os.fstat(fd).st_size

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """Fill `buffer` by reads straight into it; nothing is mapped, so nothing can SIGBUS."""
        rest = buffer.cast("B")
        if self.nbytes >= _LONG_BYTES:
            left = self._read_past_cache(offset, rest)
            offset, rest = offset + len(rest) - left, rest[len(rest) - left :]
        while len(rest) > 0:
            with _naming(self._path):
                count = os.preadv(self._fd, [rest[:_MAX_CALL_BYTES]], offset)
            if count == 0:
                raise EOFError(f"{self._path}: ends at byte {offset}, {len(rest)} bytes short")
            rest = rest[count:]
            offset += count

    def _read_past_cache(self, offset: int, target: memoryview) -> int:
        """Return how many bytes of `target` are left to be read in the usual way."""
        with _naming(self._path):
            if self._long is None:
                self._long = LongRead(self._fd, self.nbytes)
            buffer = self._buffers.take()
            try:
                return self._long.fill(offset, target, buffer)
            finally:
                self._buffers.give(buffer)


def _seen(error: OSError, where: str) -> OSError:
    """Return what a system says of a name, in words where the name is a symbolic link."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK) and os.path.islink(where):
        return OSError(errno.ELOOP, _LINK, where)
    error.filename = where
    return error


@contextlib.contextmanager
def _closing(fd: int, path: str) -> Iterator[int]:
    try:
        with _naming(path):
            yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the path into errors of calls that know only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = path
        raise


def _sync(fd: int) -> None:
    if _FULL_SYNC is None:
        os.fsync(fd)
    else:
        fcntl.fcntl(fd, _FULL_SYNC)


def _make_folder_durably(path: str) -> None:
    """Make a folder and its missing parents, each name synced before anything is put below it."""
    parent = os.path.dirname(path)
    if os.path.isdir(path):
        # Perhaps an earlier start was killed between making it and syncing its name.
        with contextlib.suppress(PermissionError):
            _sync_folder(parent)
        return
    _make_folder_durably(parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    _sync_folder(parent)


def _sync_folder(path: str) -> None:
    with _closing(os.open(path, _FOLDER_FLAGS), path) as fd:
        _sync(fd)


# The storage of a folder, be there compressed files in it or not.


# Folders of a run in which more folders of checkpoints stand.
_INNER_FOLDERS = (".staging", ".trash", "set-aside", "branches")


def storage_at(
    path: str | os.PathLike[str], *, create: bool = True, folder: str | None = None
) -> Storage:
    """Return the storage of a folder on the local disk: a plain one where nothing is compressed.

    Only one that holds compressed files is wrapped, so that all others pay nothing for it.

    Args:
        path: The folder.
        create: As `LocalStorage` takes it.
        folder: The name of the one folder in it that is going to be read; None: any.

    Example:
        >>> import tempfile
        >>> storage_at(tempfile.mkdtemp()).list("")
        []
    """
    local = LocalStorage(path, create=create)
    root = os.fspath(path)
    if not (_holds_compressed(root) if folder is None else _has_compressed(root, folder)):
        return local
    from unbroken.storage.compressed import PlainView

    return PlainView(local)


def _holds_compressed(root: str) -> bool:
    """Return whether a file in a folder of a run, or of one of its branches, is compressed."""
    for name in _folders_in(root):
        below = os.path.join(root, name)
        if name in _INNER_FOLDERS and _holds_compressed(below):
            return True
        if name not in _INNER_FOLDERS and _has_compressed(root, name):
            return True
        if os.path.basename(root) == "branches" and _holds_compressed(below):
            return True
    return False


def _folders_in(root: str) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # what cannot be listed is reported when it is used
        return []


def _has_compressed(root: str, name: str) -> bool:
    try:
        with os.scandir(os.path.join(root, name)) as entries:
            return any(entry.name.endswith(COMPRESSED) for entry in entries)
    except OSError:
        return False
