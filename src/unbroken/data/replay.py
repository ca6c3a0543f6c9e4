"""Which loaders must be read again: their own state would not be exact, or is not there."""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    default_convert,
)

from unbroken.data.asking import answers_anything, has, is_of
from unbroken.data.keyed_dataset import is_deterministic


def reason_to_replay(loader: Any) -> str | None:
    """Return why a loader cannot be continued exactly through its own state; None if it can.

    Known and measured: torchdata 0.11's loader does not store what its workers' random
    generators had come to, and draws the order of a sampler without a state anew, from whatever
    the global generators then are; `datasets` 5.2 does not store what is in a shuffle buffer.

    Args:
        loader: A loader or an iterable data set.

    Example:
        >>> reason_to_replay([])
        'it has no state_dict'
    """
    if not _has_state(loader):
        return "it has no state_dict"
    if is_of(loader, "accelerate"):
        return "it reads a batch further than the one that it gives"
    dataset = getattr(loader, "dataset", None)
    if getattr(loader, "num_workers", 0) and _draws_in_workers(loader, dataset):
        return (
            "its state_dict does not hold its workers' random state; if its data set and its "
            "collate_fn draw nothing at random, declare that with `deterministic = True`"
        )
    if _has_shuffle_buffer(loader) or _has_shuffle_buffer(dataset):
        return "its state_dict does not hold what is in its shuffle buffer"
    return _reason_in_order(loader, dataset) if isinstance(loader, DataLoader) else None


def reason_against_its_state(loader: Any) -> str | None:
    """Return why a torch loader that is used by itself does not go on exactly through its state.

    Unlike in a source of batches, nobody seeds its samplers' own generators at each epoch.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> reason_against_its_state(DataLoader([1, 2]))
        'it has no state_dict'
    """
    reason = reason_to_replay(loader)
    sampler = getattr(loader.batch_sampler, "sampler", None) or loader.sampler
    if reason is None and type(sampler) in _DRAW:
        reason = f"its state_dict does not hold the order of its {type(sampler).__name__}"
    return reason


def _has_state(thing: Any) -> bool:
    return has(thing, "state_dict") and has(thing, "load_state_dict")


def _draws_in_workers(loader: Any, dataset: Any) -> bool:
    collate = getattr(loader, "collate_fn", None)
    collates = collate in (None, default_collate, default_convert) or is_deterministic(collate)
    return not (is_deterministic(dataset) and collates)


def _reason_in_order(loader: Any, dataset: Any) -> str | None:
    """Return why the order of a torch loader's epoch cannot be found again from its middle."""
    if isinstance(dataset, IterableDataset):
        if _has_state(dataset):
            return None
        return f"{type(dataset).__name__} has no state_dict"
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    inner = _lazy_sampler(batches)
    return None if inner is None else f"its state_dict does not hold the order of its {inner}"


def _lazy_sampler(sampler: Any) -> str | None:
    """Return the sampler of an order that neither its state nor its own generator holds."""
    if _has_state(sampler) or type(sampler) in _WITHOUT_DRAWS:
        return None
    if type(sampler) in _DRAW:
        return None if sampler.generator is not None else type(sampler).__name__
    kind = type(sampler)
    if is_of(sampler, "torchdata") and kind.__name__ == "RandomSampler":
        return None  # its iterator has a state, and it a generator
    if kind.__name__ == "BatchSampler" and any(is_of(sampler, name) for name in _OF_TORCH):
        return _lazy_sampler(sampler.sampler)
    return kind.__name__


_OF_TORCH = ("torch", "torchdata")
_DRAW = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_WITHOUT_DRAWS = (SequentialSampler, DistributedSampler, list, tuple, range)


def _has_shuffle_buffer(dataset: Any) -> bool:
    """Whether an iterable data set of `datasets` shuffles; it is a chain of iterables."""
    waiting = [] if answers_anything(dataset) else [getattr(dataset, "_ex_iterable", None)]
    while waiting:
        part = waiting.pop()
        if part is None:
            continue
        if type(part).__name__.startswith("BufferShuffled"):
            return True
        waiting += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", [])]
    return False
