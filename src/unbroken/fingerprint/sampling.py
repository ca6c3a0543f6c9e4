"""A few records of a data set as digests, read where reading can change nothing here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from unbroken.data import KeyedRandom, Permutation, Seen, derive_key, drawn_from
from unbroken.fingerprint.apart import Apart, Heard
from unbroken.fingerprint.asking import Failed, tried
from unbroken.fingerprint.owners import qualified_name
from unbroken.fingerprint.plain import NOT_COMPARED, Plain
from unbroken.fingerprint.records import record_digest

_RECORDS = 16
_SECONDS = 0.05  # for reading
_DEADLINE = 3.0  # for all of it, a fork and a first record that is slow included
_KEY = derive_key(0, "fingerprint")
_TWICE = 2
_OWN_RECORD, _OWN_BATCH = "a record moves a generator", "a batch is not the same twice"
_INERT = (bool, int, float, complex, str, bytes, type(None), np.ndarray, np.generic, torch.Tensor)


def begin_sampling(
    data: Any, length: int, collate: Callable[..., Any] | None, clock: Callable[[], float]
) -> Callable[[], dict[str, Plain]]:
    """Begin to read some records, the same ones each time; return what waits for their digests.

    A data set runs in a forked child, and so does a collator: whatever they open, draw or count
    stays there. Lists, arrays and tensors are read here. Where there is no child to read
    in, or it reads not one record twice in time, the facts say so instead.
    """
    indices = sampled_records(length) if length > 0 else []
    inert: dict[str, Plain] = {}
    if not indices or _is_inert(data, indices):
        records = [record_digest(data[index]) for index in indices]
        inert = {"records": [*records], "repeatable": True} if records else {}
        if not indices or collate is None:
            return lambda: inert
    on_device = _device_has_begun()

    def read(write: Callable[[str], None]) -> None:
        for line in _lines(data, indices, collate, clock, on_device=on_device):
            write(line)

    reading = Apart(read, seconds=_DEADLINE)
    return lambda: {**_facts(reading.heard()), **inert}


def _device_has_begun() -> bool:
    """Return whether a forked child could not use the device."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _facts(heard: Heard) -> dict[str, Plain]:
    """Return the facts in what a child wrote: digests, and perhaps why there are no more."""
    found = [line for line in heard.lines if line not in (_OWN_RECORD, _OWN_BATCH)]
    digests = [line for line in found if not line.startswith(NOT_COMPARED)]
    own: dict[str, Plain] = {"collates": False} if _OWN_BATCH in heard.lines else {}
    if len(digests) < 2:  # the first record is read twice
        reasons = [line for line in found if line not in digests]
        return {**own, "records": reasons[0] if reasons else f"{NOT_COMPARED}{heard.missing}"}
    is_same = digests[0] == digests[1] and _OWN_RECORD not in heard.lines
    return {**own, "records": [digests[0], *digests[2:]], "repeatable": is_same}


def sampled_records(length: int) -> list[int]:
    """Return the first record, the last one, and others by the order of a fixed key."""
    some = Permutation(length, _KEY)(np.arange(min(length, _RECORDS), dtype=np.uint64))
    return list(dict.fromkeys([0, length - 1, *some.tolist()]))[:_RECORDS]


def _lines(
    data: Any,
    indices: list[int],
    collate: Callable[..., Any] | None,
    clock: Callable[[], float],
    *,
    on_device: bool,
) -> Iterator[str]:
    """Yield the digest of the first record twice, then those of the others, while time allows.

    After them a line tells of records, or batches of them, that are not the same twice.
    A record that raises counts by its exception if others can be read. Where none can, or what is
    missing is only missing in this process (a connection, memory, the device), a line says so.
    """
    passing = (OSError, MemoryError, *((RuntimeError,) if on_device else ()))
    deadline, held, can_be_read = clock() + _SECONDS, [], False
    first: list[Any] = []  # the first record, read twice
    moved: list[dict[str, str]] = []
    with KeyedRandom() as rng:
        for position, index in enumerate([indices[0], *indices]):
            rng.seed(derive_key(_KEY, index))
            record = _read(data, index)
            digest = record if isinstance(record, Failed) else tried(record_digest, record)
            if isinstance(digest, Failed):
                reason = _reason(digest.error, on_device=on_device)
                if isinstance(digest.error, passing):
                    break
                digest = record_digest(qualified_name(digest.error))
            else:
                can_be_read = True
            if len(first) < _TWICE:
                first.append(record)
                moved.append(drawn_from(data))
            held.append(digest)
            if can_be_read:
                yield from held
                held.clear()
            if position and clock() >= deadline:
                break
        if moved and moved[0] != moved[-1]:
            yield _OWN_RECORD
        if collate is not None and can_be_read and _draws_by_itself(collate, first, rng):
            yield _OWN_BATCH
    if not can_be_read:
        yield f"{NOT_COMPARED}{reason}"


def _draws_by_itself(collate: Callable[..., Any], records: list[Any], rng: KeyedRandom) -> bool:
    """Return whether a collator gives another batch of the same records under the same key."""
    found = []
    for _ in range(_TWICE):
        own = tried(copy.deepcopy, records)  # a collator may change what it is given
        rng.seed(_KEY)
        batch = tried(collate, own)
        if isinstance(own, Failed) or isinstance(batch, Failed):
            return False  # of records that do not go together, say
        seen = Seen()
        seen.add(batch)
        found.append((seen.text(), drawn_from(collate)))
    return bool(found[0] != found[1])


def _read(data: Any, index: int) -> Any:
    """Return a record, or a batch where a data set takes lists of indices; or what it raised."""
    record = tried(lambda: data[index])
    if not isinstance(record, Failed):
        return record
    of_batch = tried(lambda: data[[index]])
    return record if isinstance(of_batch, Failed) else of_batch


def _reason(error: Exception, *, on_device: bool) -> str:
    name = qualified_name(error).removeprefix("builtins.")
    where = "in a process that cannot use the device"
    return f"{name} {where}" if on_device else f"reading one raised {name}"


def _is_inert(data: Any, indices: list[int]) -> bool:
    """Return whether reading these records runs no code but Python's, NumPy's and torch's."""
    if type(data) in (range, np.ndarray, torch.Tensor, TensorDataset):
        return True
    if type(data) is Subset:
        inner = [data.indices[index] for index in indices]
        return type(data.indices) in (list, range) and _is_inert(data.dataset, inner)
    return type(data) in (list, tuple) and all(_is_plain(data[index]) for index in indices)


def _is_plain(record: Any, depth: int = 0) -> bool:
    if type(record) in _INERT or isinstance(record, np.generic):
        return True
    if depth > 3 or type(record) not in (list, tuple, dict):
        return False
    parts = record.values() if isinstance(record, dict) else record
    return all(_is_plain(part, depth + 1) for part in parts)
