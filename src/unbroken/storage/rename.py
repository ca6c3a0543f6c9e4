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


def rename_no_replace(source: str, target: str) -> None:
    """Rename `source` to `target` in one step, unless `target` exists.

    Where the system or the file system has no such call, existence is checked first; then
    another process may slip in between, which the lock on a run directory rules out.

    Raises:
        FileExistsError: `target` exists, be it an empty folder.
        OSError: As `os.rename`.
    """
    call = _renameat2()
    if call is not None:
        code = call(os.fsencode(source), os.fsencode(target))
        if code == 0:
            return
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code), source, None, target)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), source, None, target)
    os.rename(source, target)


@cache
def _renameat2() -> Callable[[bytes, bytes], int] | None:
    import ctypes  # here: only those who write pay for it

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return None

    def call(source: bytes, target: bytes) -> int:
        failed: int = function(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE)
        return ctypes.get_errno() if failed else 0

    return call
