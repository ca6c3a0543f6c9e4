"""Negative controls: a storage that breaks one promise fails the test of that promise."""

from __future__ import annotations

import pytest

from unbroken.storage import MemoryStorage
from unbroken.testing import StorageContract

CONTRACT = StorageContract()


class RenameReplaces(MemoryStorage):
    def rename(self, source, target):
        if target in self._root.names:
            self._drop(target)
        super().rename(source, target)


class LocksNobody(MemoryStorage):
    def lock(self, path, owner):
        self._locks.pop(path, None)
        return super().lock(path, owner)


class CreateOverwrites(MemoryStorage):
    def create(self, path, nbytes=0):
        self._root.names.pop(path, None)
        return super().create(path, nbytes)


class ReadsShort(MemoryStorage):
    def open(self, path):
        handle = super().open(path)
        handle._file = type(handle._file)(bytes(handle._file.data) + bytes(100))
        return handle


class ListsUnsorted(MemoryStorage):
    def list(self, path):
        return super().list(path)[::-1]


class TruncateGrows(MemoryStorage):
    def truncate(self, path, nbytes):
        self._file(path).data.extend(bytes(nbytes))


@pytest.mark.parametrize(
    ("storage", "test"),
    [
        (
            RenameReplaces(),
            lambda s: CONTRACT.test_rename_replaces_nothing(s, "file", "other-file"),
        ),
        (LocksNobody(), CONTRACT.test_a_held_lock_is_refused_and_names_its_owner),
        (CreateOverwrites(), CONTRACT.test_create_refuses_a_path_that_exists),
        (ReadsShort(), lambda s: CONTRACT.test_reading_past_the_end_is_an_error(s, 0)),
        (ListsUnsorted(), CONTRACT.test_a_listing_is_sorted_and_flat),
        (TruncateGrows(), CONTRACT.test_truncate_never_makes_a_file_longer),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, MemoryStorage) else "",
)
def test_a_storage_that_breaks_a_promise_fails(storage, test):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test(storage)
