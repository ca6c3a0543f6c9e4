"""Places that keep bytes: the local disk and memory, compressed or not; one narrow interface."""

from __future__ import annotations

from unbroken.storage.compressed import CompressedStorage as CompressedStorage
from unbroken.storage.local import LocalStorage as LocalStorage
from unbroken.storage.local import storage_at as storage_at
from unbroken.storage.memory import MemoryStorage as MemoryStorage
from unbroken.storage.protocol import Bytes as Bytes
from unbroken.storage.protocol import Lock as Lock
from unbroken.storage.protocol import ReadHandle as ReadHandle
from unbroken.storage.protocol import Stat as Stat
from unbroken.storage.protocol import Storage as Storage
from unbroken.storage.protocol import WriteHandle as WriteHandle
from unbroken.storage.subfolder import FolderStorage as FolderStorage

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
