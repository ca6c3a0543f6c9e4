"""Storages that keep long files compressed, and show them as if they were not."""

from __future__ import annotations

import errno
import os

from unbroken.storage.compressed_file import (
    CompressedReadHandle,
    CompressedWriteHandle,
    is_fault_of_the_file,
)
from unbroken.storage.folder import FolderStorage
from unbroken.storage.interface import ReadHandle, Stat, Storage, WriteHandle
from unbroken.storage.local import LocalStorage
from unbroken.storage.planes import load_zstd

_KEPT = ".planes"  # behind the name of a compressed file, in the other storage
_TENSORS = ".safetensors"
_LONG_BYTES = 1 << 20


class PlainView(FolderStorage):
    """Another storage, whose compressed files look like plain ones. It compresses nothing.

    Args:
        inner: The other storage.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> disk = MemoryStorage()
        >>> with CompressedStorage(disk).create("a.safetensors", 4 << 20) as file:
        ...     file.write(bytes(4 << 20))
        >>> disk.list(""), PlainView(disk).list("")
        (['a.safetensors.planes'], ['a.safetensors'])
        >>> PlainView(disk).stat("a.safetensors").nbytes
        4194304
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, "")

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file that did not exist, as the other storage does."""
        self._refuse_taken(path + _KEPT, path)
        return self._inner.create(path, nbytes)

    def open(self, path: str) -> ReadHandle:
        """Open a file for reading; of a compressed one, the plain bytes."""
        name = self._kept(path)
        file = self._inner.open(name)
        if name == path:
            return file
        try:
            return CompressedReadHandle(file, self.describe(name))
        except BaseException:
            file.close()
            raise

    def append(self, path: str, data: bytes) -> None:
        """Write `data` at the end of a file; a compressed one is refused (`EOPNOTSUPP`)."""
        self._refuse_compressed(path)
        self._inner.append(path, data)

    def truncate(self, path: str, nbytes: int) -> None:
        """Cut a file to its first `nbytes` bytes; a compressed one is refused (`EOPNOTSUPP`)."""
        self._refuse_compressed(path)
        self._inner.truncate(path, nbytes)

    def sync_file(self, path: str) -> None:
        """Make the bytes of a file durable."""
        self._inner.sync_file(self._kept(path))

    def rename(self, source: str, target: str) -> None:
        """Move a file or folder in one atomic step, replacing nothing."""
        self._inner.rename(*self._names(source, target))

    def link(self, source: str, target: str) -> None:
        """Give a file a second name."""
        self._inner.link(*self._names(source, target))

    def remove_file(self, path: str) -> None:
        """Remove the name of a file."""
        self._inner.remove_file(self._kept(path))

    def list(self, path: str) -> list[str]:
        """Return the sorted names in a folder."""
        return sorted(name.removesuffix(_KEPT) for name in self._inner.list(path))

    def stat(self, path: str) -> Stat | None:
        """Return what is known of a file; the length of a compressed one is that of its content.

        A compressed file that is cut off or damaged has the length that it has on the disk.
        """
        name = self._kept(path)
        found = self._inner.stat(name)
        if found is None or name == path:
            return found
        try:
            with self.open(path) as file:
                return Stat(file.nbytes, False, found.modified_ns, found.identity)
        except OSError as error:
            if not is_fault_of_the_file(error):
                raise
            return found

    def _kept(self, path: str) -> str:
        """Return the name that a file has in the other storage."""
        if not path or self._inner.stat(path) is not None:
            return path
        return path if self._inner.stat(path + _KEPT) is None else path + _KEPT

    def _names(self, source: str, target: str) -> tuple[str, str]:
        """Return the names of a file, and of what it is to become, in the other storage."""
        name = self._kept(source)
        if name == source:
            self._refuse_taken(target + _KEPT, target)
            return source, target
        self._refuse_taken(target, target)
        return name, target + _KEPT

    def _refuse_taken(self, name: str, path: str) -> None:
        if self._inner.stat(name) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.describe(path))

    def _refuse_compressed(self, path: str) -> None:
        if self._kept(path) != path:
            what = "is compressed, and cannot be changed"
            raise OSError(errno.EOPNOTSUPP, what, self.describe(path))


class CompressedStorage(PlainView):
    """Another storage, in which long files are kept compressed, without loss.

    What is read is, byte for byte, what was written; sizes are those of the plain bytes. Files of
    the other storage that are not compressed are read as they are, so that one run may hold both.
    Worth it where the storage is slow or metered: it costs the processor's time.

    Args:
        inner: The other storage.
        suffix: How the names end of files to compress. Others are written as they are.
        least_bytes: So long at least is a file announced that is compressed.

    Raises:
        ConfigError: The library of zstd is not installed.

    Example:
        >>> import tempfile
        >>> storage = CompressedStorage(LocalStorage(tempfile.mkdtemp()))
        >>> with storage.create("model.safetensors", 2 << 20) as file:
        ...     file.write(bytes(2 << 20))
        ...     file.sync()
        >>> storage.stat("model.safetensors").nbytes
        2097152
    """

    def __init__(
        self, inner: Storage, *, suffix: str = _TENSORS, least_bytes: int = _LONG_BYTES
    ) -> None:
        super().__init__(inner)
        self._suffix = suffix
        self._least_bytes = least_bytes
        load_zstd(inner.describe())

    def create(self, path: str, nbytes: int = 0) -> WriteHandle:
        """Create a file that did not exist; one that is going to be long is compressed."""
        if nbytes < self._least_bytes or not path.endswith(self._suffix):
            return super().create(path, nbytes)
        self._refuse_taken(path, path)
        # Long, but nobody knows how long: room for all of it may not be there, nor be needed.
        file = self._inner.create(path + _KEPT, min(nbytes, _LONG_BYTES))
        return CompressedWriteHandle(file, self.describe(path + _KEPT))


def storage_at(path: str | os.PathLike[str], *, create: bool = True) -> Storage:
    """Return the storage of a folder on the local disk, which may hold compressed files.

    Args:
        path: The folder.
        create: As `LocalStorage` takes it.

    Example:
        >>> import tempfile
        >>> storage_at(tempfile.mkdtemp()).list("")
        []
    """
    return PlainView(LocalStorage(path, create=create))
