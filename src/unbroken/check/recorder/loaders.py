"""Which samples a `DataLoader` takes, whatever their contents become on the way."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from .digests import digest_of

_MAX_SAMPLES = 4096


@dataclass
class _EpochIterator:
    """One iterator of a loader: the batches on their way, and how many have come."""

    waiting: deque[list[Any]] = field(default_factory=deque)
    given: int = 0


class LoaderLog:
    """Follows every data loader of a process: dataset, epoch, batch and the samples in it.

    The sampler is ahead of the batches where workers read ahead; batches come in its order.
    """

    def __init__(self) -> None:
        self._iterators: weakref.WeakKeyDictionary[Any, _EpochIterator] = (
            weakref.WeakKeyDictionary()
        )
        self._datasets: dict[int, int] = {}
        self._epochs: dict[int, int] = {}

    def note_index(self, iterator: Any, index: Any) -> None:
        """Note what the sampler gave for one batch."""
        known = self._iterators.setdefault(iterator, _EpochIterator())
        if iterator._num_yielded < known.given:  # noqa: SLF001  (the iterator was begun anew)
            known.waiting.clear()
            known.given = 0
        known.waiting.append(_names(index))

    def place_of(self, iterator: Any, index: int) -> list[Any]:
        """Return dataset, epoch, number in the epoch and samples of the batch that came."""
        dataset = self._datasets.setdefault(id(iterator._dataset), len(self._datasets))  # noqa: SLF001
        if index == 0:
            self._epochs[dataset] = self._epochs.get(dataset, 0) + 1
        known = self._iterators.setdefault(iterator, _EpochIterator())
        known.given = index + 1
        samples = known.waiting.popleft() if known.waiting else []
        return [dataset, self._epochs.get(dataset, 0), index, samples]


def _names(index: Any) -> list[Any]:
    """Return an index for each sample; none for an iterable dataset, which has none."""
    indices = index if isinstance(index, (list, tuple)) else [index]
    if len(indices) > _MAX_SAMPLES or any(one is None for one in indices):
        return []
    return [one if isinstance(one, int) else digest_of(repr(one).encode())[:8] for one in indices]
