"""The one rule for paths inside a storage, and the one way to open what stands at one."""

from __future__ import annotations

import errno
import os
import stat as modes


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
