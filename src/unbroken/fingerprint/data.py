"""What the data of a run are: length, a sample of the records, and the code that makes batches."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from unbroken.data import KeyedRandom, Permutation, derive_key
from unbroken.fingerprint.plain import Plain, plain_attributes
from unbroken.fingerprint.records import record_digest
from unbroken.fingerprint.source import (
    callable_facts,
    is_users_own,
    qualified_name,
    source_digest,
)

_RECORDS = 16
_SECONDS = 0.02
_KEY = derive_key(0, "fingerprint")


def data_facts(
    data: Any,
    collate_fn: Callable[..., Any] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Plain]:
    """Return what training data are, from a few of their records; draws from no generator.

    The records are read from a shallow copy of the data set, under keyed generators, so that
    neither the user's generators nor files that a data set opens when first read are touched.
    Sixteen are read, or as many as 20 milliseconds allow: lists are compared by what both have.

    Args:
        data: A map-style data set, a `DataLoader`, or any other iterable (which is not read).
        collate_fn: Makes a batch of a list of samples.
        clock: Seconds.

    Returns:
        `class`; `length`; `records`: digests; or the data set's own `fingerprint` instead of
        them; `repeatable`: False if a record was not the same twice under the same key, because
        it draws from a generator of its own; `source`, `transform`, `collate_fn`, `tokenizer`.

    Example:
        >>> facts = data_facts([3, 1, 2])
        >>> facts["length"], len(facts["records"]), facts["repeatable"]
        (3, 3, True)
    """
    if isinstance(data, DataLoader):
        collate_fn = data.collate_fn if collate_fn is None else collate_fn
        return {**data_facts(data.dataset, collate_fn, clock=clock), "loader": _loader(data)}
    facts: dict[str, Plain] = {"class": qualified_name(type(data)), **_code(data, collate_fn)}
    if isinstance(data, Sized):
        facts["length"] = len(data)
    own = getattr(data, "fingerprint", None)
    if isinstance(own, str):
        return {**facts, "fingerprint": own}
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        return facts
    return {**facts, **_sampled(data, len(data), clock)}


def _loader(loader: DataLoader[Any]) -> dict[str, Plain]:
    return {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "sampler": qualified_name(type(loader.sampler)),
    }


def _code(data: Any, collate_fn: Callable[..., Any] | None) -> dict[str, Plain]:
    facts: dict[str, Plain] = {}
    sources = {qualified_name(type(one)): source_digest(one) for one in _layers(data)}
    own: dict[str, Plain] = {name: one for name, one in sources.items() if one is not None}
    if own:
        facts["source"] = own
    for name in ("transform", "target_transform", "transforms"):
        transform = getattr(data, name, None)
        if callable(transform):
            facts[name] = callable_facts(transform)
    if collate_fn is not None:
        facts["collate_fn"] = callable_facts(collate_fn)
    tokenizers = (getattr(holder, "tokenizer", None) for holder in (data, collate_fn))
    for tokenizer in tokenizers:
        if tokenizer is not None:
            facts["tokenizer"] = _tokenizer(tokenizer)
    return facts


def _layers(data: Any) -> Iterator[Any]:
    """Yield a data set, and those that it is made of."""
    yield data
    for part in _inner(data):
        yield from _layers(part)


def _inner(data: Any) -> list[Any]:
    if isinstance(data, Subset):
        return [data.dataset]
    return list(data.datasets) if isinstance(data, ConcatDataset) else []


def _tokenizer(tokenizer: Any) -> str:
    """Return a digest of the vocabulary, rules and special tokens of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if callable(getattr(backend, "to_str", None)):
        text = backend.to_str()
    elif callable(getattr(tokenizer, "get_vocab", None)):
        text = repr(sorted(tokenizer.get_vocab().items()))
    else:
        text = repr((qualified_name(type(tokenizer)), plain_attributes(tokenizer)))
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _sampled(data: Any, length: int, clock: Callable[[], float]) -> dict[str, Plain]:
    """Read some records, the same ones each time."""
    if length < 1 or (copied := _copied(data)) is None:
        return {}
    digests: list[Plain] = []
    repeatable = True
    deadline = clock() + _SECONDS
    with KeyedRandom() as rng:
        for index in _indices(length):
            digests.append(_read(copied, index, rng))
            if len(digests) == 1:
                repeatable = _read(copied, index, rng) == digests[0]
            if clock() >= deadline:
                break
    return {"records": digests, "repeatable": repeatable}


def _indices(length: int) -> list[int]:
    """Return the first record, the last one, and others by the order of a fixed key."""
    some = Permutation(length, _KEY)(np.arange(min(length, _RECORDS), dtype=np.uint64))
    return list(dict.fromkeys([0, length - 1, *some.tolist()]))[:_RECORDS]


def _read(data: Any, index: int, rng: KeyedRandom) -> str:
    rng.seed(derive_key(_KEY, index))
    return record_digest(data[index])


def _copied(data: Any) -> Any:
    """Return a shallow copy whose files and generators are its own; None if that cannot be."""
    if isinstance(data, list | tuple | range | np.ndarray | torch.Tensor):
        return data  # reading them changes nothing
    try:
        copied = copy.copy(data)
    except TypeError:
        return None
    for name, value in getattr(copied, "__dict__", {}).items():
        own = _own_copy(value)
        if own is not value:
            copied.__dict__[name] = own
    return copied


def _own_copy(value: Any) -> Any:
    if isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
        return copy.deepcopy(value)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if _is_data_set(value):
        return _copied(value)
    if isinstance(value, list | tuple) and value and _is_data_set(value[0]):
        return [_copied(part) for part in value]
    return value


def _is_data_set(value: Any) -> bool:
    if isinstance(value, Dataset):
        return True
    has_records = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return has_records and is_users_own(type(value))
