"""Each storage of the project runs the public contract."""

from __future__ import annotations

import pytest

from unbroken.storage import (
    CompressedStorage,
    FolderStorage,
    LocalStorage,
    MemoryStorage,
)
from unbroken.storage.compressed import PlainView
from unbroken.testing import FaultyStorage, KillingStorage, SharedStorageContract, StorageContract


class TestLocalStorage(SharedStorageContract):
    @pytest.fixture
    def open_again(self, tmp_path):
        return lambda: LocalStorage(tmp_path / "root")


class TestKillingStorage(SharedStorageContract):
    @pytest.fixture
    def open_again(self, tmp_path):
        return lambda: KillingStorage(tmp_path / "root")


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self):
        return MemoryStorage()


class TestFolderStorage(SharedStorageContract):
    @pytest.fixture
    def open_again(self, tmp_path):
        LocalStorage(tmp_path / "root" / "folder")
        return lambda: FolderStorage(LocalStorage(tmp_path / "root"), "folder")


class TestCompressedStorage(SharedStorageContract):
    @pytest.fixture
    def open_again(self, tmp_path):
        return lambda: CompressedStorage(LocalStorage(tmp_path / "root"), suffix="")


class TestCompressedStorageInMemory(StorageContract):
    @pytest.fixture
    def storage(self):
        return CompressedStorage(MemoryStorage(), suffix="", least_bytes=1)


class TestPlainView(SharedStorageContract):
    @pytest.fixture
    def open_again(self, tmp_path):
        return lambda: PlainView(LocalStorage(tmp_path / "root"))


class TestFaultyStorage(StorageContract):
    @pytest.fixture
    def storage(self):
        return FaultyStorage()


class TestFaultyStorageAfterAKill(StorageContract):
    @pytest.fixture
    def storage(self):
        return FaultyStorage().after_kill()
