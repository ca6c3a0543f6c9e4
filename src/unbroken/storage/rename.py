"""Rename that never replaces anything, atomically where the system can.

POSIX rename() replaces a file, or an empty folder, without a word. Linux has had
renameat2(RENAME_NOREPLACE) since 3.15; Python does not wrap it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cache

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
