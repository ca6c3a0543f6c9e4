"""What a sampler gives, one list after the other, so that it can be drawn again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler

from unbroken.data import KeyedRandom
from unbroken.stored_names import stored_name


def drawn_apart(lists: Iterator[Any]) -> Iterator[Any]:
    """Yield what a sampler gives; what else draws between two of its lists does not change them.

    The first is drawn from the global generators as they are, and moves them, as in the host's
    own loop. For each later one they stand where the one before left them, and are put back.

    Example:
        >>> list(drawn_apart(iter([[1, 2], [3]])))
        [[1, 2], [3]]
    """
    end = object()
    indices, states = next(lists, end), _global_states()
    while indices is not end:
        yield indices
        with KeyedRandom():
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.default_generator.set_state(states[2])
            indices, states = next(lists, end), _global_states()


def _global_states() -> tuple[Any, Any, torch.Tensor]:
    python, legacy = random.getstate(), np.random.get_state(legacy=False)
    return python, legacy, torch.default_generator.get_state()


class AskedFor:
    """How often a sampler was asked for a list, in each epoch, the answer that it ended included.

    Example:
        >>> asked = AskedFor()
        >>> asked.begin(0), list(asked.count(iter([[1, 2], [3]]))), asked.times
        (None, [[1, 2], [3]], [3])
    """

    def __init__(self) -> None:
        self.times: list[int] = []

    def begin(self, epoch: int) -> None:
        """Begin to count in an epoch."""
        before = self.times[:epoch]
        self.times = [*before, *[0] * (epoch - len(before)), 0]

    def count(self, lists: Iterator[Any]) -> Iterator[Any]:
        """Yield the lists of the epoch that was begun last."""
        times, epoch, end = self.times, len(self.times) - 1, object()
        while True:
            times[epoch] += 1
            if (indices := next(lists, end)) is end:
                return
            yield indices


def draw_again(
    lists: Iterator[Any],
    times: int | None,
    compare: Callable[[Any], object],
    compare_end: Callable[[], object],
) -> None:
    """Ask for as many lists as were asked for before; None: for all. Compare each, and the end."""
    count = 0
    for one in islice(lists, times):
        compare(one)
        count += 1
    if times is None or count < times:
        compare_end()


# What is left of an epoch, and what a batch sampler is made of.


@stored_name("unbroken.adapters.transformers.batches._Rest")
class RestOfAnEpoch(BatchSampler):
    """What is left of an epoch, cut into batches from a sample on."""

    def __init__(self, inner: Any, samples: int) -> None:
        self.inner, self.samples = inner, samples
        self.batch_size, self.drop_last = inner.batch_size, inner.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        left = islice(iter(self.inner.sampler), self.samples, None)
        while batch := list(islice(left, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch

    def __len__(self) -> int:
        left = max(0, len(self.inner.sampler) - self.samples)
        return left // self.batch_size if self.drop_last else -(-left // self.batch_size)


def rest_of(inner: Any, samples: int) -> Any:
    """Return the rest of an epoch; of one that ranks share, each one's part of it."""
    shared = getattr(inner, "batch_sampler", None)
    if shared is None:
        return RestOfAnEpoch(inner, samples)
    part = copy.copy(inner)
    part.batch_sampler = RestOfAnEpoch(shared, samples)
    return part


def parts_of(inner: Any) -> list[Any]:
    """Return a batch sampler and all that it is made of, each once."""
    found: list[Any] = []
    waiting = [inner]
    while waiting:
        part = waiting.pop()
        if part is None or any(part is one for one in found):
            continue
        found.append(part)
        waiting += [getattr(part, name, None) for name in ("sampler", "batch_sampler")]
    return found
