"""What the data of a run are: length, a sample of the records, and the code that makes batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Subset,
    default_collate,
    default_convert,
)

from unbroken.fingerprint.asking import asked, attributes_of, tried
from unbroken.fingerprint.facts import callable_facts, facts_of, facts_of_items
from unbroken.fingerprint.owners import is_users_own, qualified_name
from unbroken.fingerprint.plain import Plain
from unbroken.fingerprint.sampling import begin_sampling
from unbroken.fingerprint.source import source_digest
from unbroken.fingerprint.tokenizers import tokenizer_digest

_TRANSFORMS = ("transform", "target_transform", "transforms")
_TOLD_ONCE = frozenset({"tokenizer", "data_source", "dataset", "sampler", *_TRANSFORMS})
_OF_THIS_RANK = frozenset({"num_replicas", "rank", "epoch", "num_samples", "total_size"})


def data_facts(
    data: Any,
    collate_fn: Callable[..., Any] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Plain]:
    """Return what training data are, from a few of their records; leaves no trace in them.

    The records are read under keyed generators. A data set runs in a forked child, so that
    neither its generators nor its files nor its counters are touched here. Sixteen are read, or
    as many as 50 milliseconds allow: lists are compared by what both have. Where they cannot be
    read (they are on a GPU, or there is no fork), `records` is a text that says so.

    Args:
        data: A map-style data set, a `DataLoader`, or any other iterable (which is not read).
        collate_fn: Makes a batch of a list of samples.
        clock: Seconds.

    Returns:
        `class`; `length`; `records`: digests (of the class of the exception where reading one
        raises); or the data set's own `fingerprint` instead of them; `repeatable`: False if a
        record was not the same twice under the same key, because it draws from a generator of
        its own; `source`, `values`: the numbers and functions in the user's own data sets;
        `transform`, `collate_fn`, `tokenizer`, `loader`.

    Example:
        >>> facts = data_facts([3, 1, 2])
        >>> facts["length"], len(facts["records"]), facts["repeatable"]
        (3, 3, True)
    """
    return begin_data_facts(data, collate_fn, clock=clock)()


def begin_data_facts(
    data: Any,
    collate_fn: Callable[..., Any] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[], dict[str, Plain]]:
    """Begin to read records, and return what waits for `data_facts`, to be called once.

    What the data are is taken now, whatever happens to them before the answer is asked for.

    Example:
        >>> facts = begin_data_facts([3, 1, 2])
        >>> facts()["length"]
        3
    """
    if isinstance(data, DataLoader):
        collate_fn = data.collate_fn if collate_fn is None else collate_fn
        begun, loader = begin_data_facts(data.dataset, collate_fn, clock=clock), _loader(data)
        return lambda: {**begun(), "loader": loader}
    facts: dict[str, Plain] = {"class": qualified_name(type(data)), **_code(data, collate_fn)}
    if isinstance(data, FunctionType | MethodType | partial):
        return lambda: {**facts, "made_by": callable_facts(data)}
    length, own = tried(len, data), asked(data, "fingerprint")
    if isinstance(length, int):
        facts["length"] = length
    if isinstance(own, str):
        return lambda: {**facts, "fingerprint": own}
    if not isinstance(length, int) or not hasattr(type(data), "__getitem__"):
        return lambda: facts
    collate = None if _draws_nothing(collate_fn) else collate_fn
    reading = begin_sampling(data, length, collate, clock)  # last: after a fork memory is slower
    return lambda: _with(facts, reading())


def _with(facts: dict[str, Plain], read: dict[str, Plain]) -> dict[str, Plain]:
    """Return the facts with those that were read; what a collator does stands with its code."""
    collates, collate = read.pop("collates", None), facts.get("collate_fn")
    if collates is False and isinstance(collate, dict):
        facts = {**facts, "collate_fn": {**collate, "repeatable": False}}
    return {**facts, **read}


def _draws_nothing(collate: Callable[..., Any] | None) -> bool:
    known = collate in (None, default_collate, default_convert)
    return known or asked(collate, "deterministic") is True


def begin_source_facts(sources: Mapping[str, Any]) -> Callable[[], dict[str, Plain]] | None:
    """Begin to take the facts of registered sources of batches and loaders; None: there are none.

    Those of the one called "data", or else of the first, stand for themselves, those of others
    under their names.

    Example:
        >>> from unbroken.data import batch_source
        >>> source = batch_source([3, 1, 2], seed=0, global_batch_size=1)
        >>> begin_source_facts({"data": source})()["length"]
        3
    """
    begun = {
        name: begin_data_facts(getattr(one, "data", one), getattr(one, "collate_fn", None))
        for name, one in sources.items()
    }
    first = "data" if "data" in begun else next(iter(begun), None)
    if first is None:
        return None

    def facts() -> dict[str, Plain]:
        others = {name: read() for name, read in begun.items() if name != first}
        return {**begun[first](), **others}

    return facts


def _loader(loader: DataLoader[Any]) -> dict[str, Plain]:
    facts: dict[str, Plain] = {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "sampler": qualified_name(type(loader.sampler)),
    }
    own = [] if type(loader.batch_sampler) in (BatchSampler, type(None)) else ["batch_sampler"]
    for name in ("sampler", *own):
        if values := _settings(getattr(loader, name)):
            facts[f"{name}_values"] = values
    return facts


def _settings(sampler: Any) -> dict[str, Plain]:
    """Return the attributes of a sampler, and of one in it; a list of indices is one itself."""
    if isinstance(sampler, list | tuple):
        return facts_of_items({"indices": sampler})
    own = attributes_of(sampler)
    if "num_replicas" in own:
        own = {name: value for name, value in own.items() if name not in _OF_THIS_RANK}
    return facts_of_items({n: v for n, v in own.items() if n not in _TOLD_ONCE})


def _code(data: Any, collate_fn: Callable[..., Any] | None) -> dict[str, Plain]:
    facts: dict[str, Plain] = {}
    layers = [layer for layer in _layers(data) if is_users_own(type(layer))]
    sources = {qualified_name(type(one)): source_digest(type(one)) for one in layers}
    if sources:
        facts["source"] = {**sources}
    if values := {qualified_name(type(one)): found for one in layers if (found := _values(one))}:
        facts["values"] = {**values}
    for name in _TRANSFORMS:
        transform = asked(data, name)
        if callable(transform):
            facts[name] = callable_facts(transform)
    if collate_fn is not None:
        facts["collate_fn"] = callable_facts(collate_fn, without=_TOLD_ONCE)
    for holder in (data, collate_fn):
        tokenizer = asked(holder, "tokenizer")
        digest = None if tokenizer is None else tried(tokenizer_digest, tokenizer)
        if isinstance(digest, str):
            facts["tokenizer"] = digest
    return facts


def _layers(data: Any, depth: int = 0) -> Iterator[Any]:
    """Yield a data set, and those that it is made of."""
    yield data
    for part in _inner(data) if depth < _MAX_LAYERS else ():
        yield from _layers(part, depth + 1)


_MAX_LAYERS = 8


def _inner(data: Any) -> list[Any]:
    if isinstance(data, Subset):
        return [data.dataset]
    return list(data.datasets) if isinstance(data, ConcatDataset) else []


def _values(data: Any) -> dict[str, Plain]:
    """Return the numbers of a data set and what it calls; texts are paths, arrays are records."""
    found: dict[str, Plain] = {}
    for name, value in attributes_of(data).items():
        counts = isinstance(value, bool | int | float) or callable(value)
        if counts and name not in _TOLD_ONCE and (facts := facts_of(value)) is not ...:
            found[name] = facts
    return dict(sorted(found.items()))
