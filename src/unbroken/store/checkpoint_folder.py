"""A checkpoint's folder on disk, before anything in it is believed."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from unbroken.errors import CheckpointNotFoundError, CorruptCheckpointError
from unbroken.storage import ReadHandle, Storage
from unbroken.store.layout import MANIFEST_NAME
from unbroken.store.manifest import MAX_MANIFEST_BYTES, Manifest

# Not damage but a process in need, which may read the same bytes well a moment later.
_NOT_THE_FILES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}


class CheckpointFolder:
    """Open the files of one checkpoint, and say what is wrong in the checkpoint's own terms.

    Args:
        storage: Where it is.
        path: Its folder.
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self.storage = storage
        self.path = path

    def read_manifest(self) -> Manifest:
        """Return the manifest, which is checked in itself but not against the other files.

        Raises:
            CheckpointNotFoundError: There is no such folder.
            CorruptCheckpointError: The manifest is missing, damaged or impossible.
            NewerFormatError: A newer version of unbroken wrote it.
        """
        found = self.storage.stat(self.path)
        if found is None:
            raise CheckpointNotFoundError(self.where(""), "there is no such checkpoint")
        if not found.is_folder:
            raise self.corrupt("", "is not a folder; a symbolic link is not followed")
        with self.open(MANIFEST_NAME) as handle:
            if handle.nbytes > MAX_MANIFEST_BYTES:
                expected = f"at most {MAX_MANIFEST_BYTES} bytes"
                raise self.corrupt(MANIFEST_NAME, "is too large", expected, handle.nbytes)
            raw = bytearray(handle.nbytes)
            with self.reading(MANIFEST_NAME):
                handle.read_into(0, memoryview(raw))
        return Manifest.from_bytes(bytes(raw), self.where(MANIFEST_NAME))

    def open(self, name: str) -> ReadHandle:
        """Open a file of the checkpoint; a missing or unreadable one is corruption."""
        with self.reading(name):
            return self.storage.open(f"{self.path}/{name}")

    @contextmanager
    def reading(self, place: str) -> Iterator[None]:
        """Turn what a disk says of unreadable bytes into the error about the checkpoint."""
        try:
            yield
        except FileNotFoundError:
            raise self.corrupt(place, "is missing") from None
        except EOFError as error:
            raise self.corrupt(place, "ends too early") from error
        except OSError as error:
            if error.errno in _NOT_THE_FILES_FAULT:
                raise
            raise self.corrupt(place, f"cannot be read ({error.strerror})") from error

    def where(self, place: str) -> str:
        """Return how messages call a file or tensor of this checkpoint."""
        return f"{self.path}: {place}" if place else self.storage.describe(self.path)

    def corrupt(
        self, place: str, what: str, expected: object = None, found: object = None
    ) -> CorruptCheckpointError:
        """Return the error that says what is wrong at `place`."""
        hint = "`unbroken verify` lists all damage of a run"
        return CorruptCheckpointError(
            self.where(place), what, expected=expected, found=found, hint=hint
        )
