"""A few records of a data set as digests, read where reading can change nothing here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from unbroken.data import KeyedRandom, Permutation, derive_key
from unbroken.fingerprint.apart import lines_from_apart
from unbroken.fingerprint.asking import Failed, tried
from unbroken.fingerprint.owners import qualified_name
from unbroken.fingerprint.plain import Plain
from unbroken.fingerprint.records import record_digest

_RECORDS = 16
_SECONDS = 0.02  # for reading
_DEADLINE = 0.5  # for all of it, a fork and a first record that is slow included
_KEY = derive_key(0, "fingerprint")
_INERT = (bool, int, float, complex, str, bytes, type(None), np.ndarray, np.generic, torch.Tensor)


def sampled_records(data: Any, length: int, clock: Callable[[], float]) -> dict[str, Plain]:
    """Return digests of some records, the same ones each time, and whether they repeat.

    A data set runs in a forked child: whatever it opens, draws or counts stays there. Lists,
    arrays and tensors of plain records are read here. Nothing is returned where there is no
    child to read in, or where it reads not one record twice in half a second.
    """
    if length < 1:
        return {}
    indices = _indices(length)
    if _is_inert(data, indices):
        records = [record_digest(data[index]) for index in indices]
        return {"records": [*records], "repeatable": True}

    def read(write: Callable[[str], None]) -> None:
        for digest in _digests(data, indices, clock):
            write(digest)

    lines = lines_from_apart(read, seconds=_DEADLINE)
    if len(lines) < 2:  # the first record is read twice
        return {}
    return {"records": [lines[0], *lines[2:]], "repeatable": lines[0] == lines[1]}


def _indices(length: int) -> list[int]:
    """Return the first record, the last one, and others by the order of a fixed key."""
    some = Permutation(length, _KEY)(np.arange(min(length, _RECORDS), dtype=np.uint64))
    return list(dict.fromkeys([0, length - 1, *some.tolist()]))[:_RECORDS]


def _digests(data: Any, indices: list[int], clock: Callable[[], float]) -> Iterator[str]:
    """Yield the digest of the first record twice, then those of the others, while time allows."""
    deadline = clock() + _SECONDS
    with KeyedRandom() as rng:
        for position, index in enumerate([indices[0], *indices]):
            rng.seed(derive_key(_KEY, index))
            digest = tried(lambda at: record_digest(data[at]), index)
            if isinstance(digest, Failed):
                if isinstance(digest.error, OSError | MemoryError):
                    return  # a connection of the parent's, or no memory: may be there next time
                digest = record_digest(qualified_name(digest.error))
            yield digest
            if position and clock() >= deadline:
                return


def _is_inert(data: Any, indices: list[int]) -> bool:
    """Return whether reading these records runs no code but Python's, NumPy's and torch's."""
    if type(data) in (range, np.ndarray, torch.Tensor, TensorDataset):
        return True
    return type(data) in (list, tuple) and all(_is_plain(data[index]) for index in indices)


def _is_plain(record: Any, depth: int = 0) -> bool:
    if type(record) in _INERT or isinstance(record, np.generic):
        return True
    if depth > 3 or type(record) not in (list, tuple, dict):
        return False
    parts = record.values() if isinstance(record, dict) else record
    return all(_is_plain(part, depth + 1) for part in parts)
