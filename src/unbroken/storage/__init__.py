"""Places that keep bytes: the local disk and memory, compressed or not; one narrow interface."""

from __future__ import annotations

from unbroken.storage.compressed import CompressedStorage as CompressedStorage
from unbroken.storage.compressed import storage_at as storage_at
from unbroken.storage.folder import FolderStorage as FolderStorage
from unbroken.storage.interface import Bytes as Bytes
from unbroken.storage.interface import Lock as Lock
from unbroken.storage.interface import ReadHandle as ReadHandle
from unbroken.storage.interface import Stat as Stat
from unbroken.storage.interface import Storage as Storage
from unbroken.storage.interface import WriteHandle as WriteHandle
from unbroken.storage.local import LocalStorage as LocalStorage
from unbroken.storage.memory import MemoryStorage as MemoryStorage

__all__ = [
    "Bytes",
    "CompressedStorage",
    "FolderStorage",
    "LocalStorage",
    "Lock",
    "MemoryStorage",
    "ReadHandle",
    "Stat",
    "Storage",
    "WriteHandle",
    "storage_at",
]
