"""Which loaders must be read again: their own state would not be exact, or is not there."""

from __future__ import annotations

from typing import Any

from unbroken.data.asking import answers_anything, has
from unbroken.data.keyed_dataset import is_deterministic


def reason_to_replay(loader: Any) -> str | None:
    """Return why a loader cannot be continued exactly through its own state; None if it can.

    Known and measured: torchdata 0.11's loader does not store what its workers' random
    generators had come to; `datasets` 5.2 does not store what is in a shuffle buffer.

    Args:
        loader: A loader or an iterable data set.

    Example:
        >>> reason_to_replay([])
        'it has no state_dict'
    """
    if not (has(loader, "state_dict") and has(loader, "load_state_dict")):
        return "it has no state_dict"
    dataset = getattr(loader, "dataset", None)
    if getattr(loader, "num_workers", 0) and not is_deterministic(dataset):
        return (
            "its state_dict does not hold its workers' random state; if its data set draws "
            "nothing at random, declare that with `deterministic = True`"
        )
    if _has_shuffle_buffer(loader) or _has_shuffle_buffer(dataset):
        return "its state_dict does not hold what is in its shuffle buffer"
    return None


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
