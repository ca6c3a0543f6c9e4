"""Batches of a map-style data set: in the host's order, from any place, with keyed randomness."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from unbroken.capture import capture_rng, restore_rng
from unbroken.data import KeyedDataset, Passed, SampleKey

_DRAW = (LengthGroupedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class Beginning:
    """Where in an epoch a resumed run begins.

    Attributes:
        epoch: The epoch.
        batches: So many batches of it are over, as the host's loop counts them.
        samples: Begin after so many samples instead, where batches were cut otherwise before.
        order: What the order of the epoch was drawn from, as `IndexBatches.drawn_from` had it.
        data: The state of an iterable data set there, as `KeyedPasses.state_after` had it.
        seeds: As `IndexBatches.seeds` had them.
        trail: What the batches that are over are held against, as `Passed` has it.
    """

    epoch: int
    batches: int
    samples: int | None = None
    order: Mapping[str, Any] = field(default_factory=dict)
    data: Any = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    trail: Mapping[str, Any] = field(default_factory=dict)


class Records(KeyedDataset):
    """The user's data set as whole batches; all else is asked of the data set itself."""

    def __init__(self, dataset: Any, seed: int, collate_fn: Any) -> None:
        super().__init__(dataset, seed, collate_fn)
        self._deterministic |= _is_plain_table(dataset)
        self._nothing_random = self._deterministic and bool(
            getattr(collate_fn, "deterministic", False)
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _is_plain_table(dataset: Any) -> bool:
    """Whether a data set is a table of `datasets` that transforms nothing as it is read."""
    if type(dataset).__module__ != "datasets.arrow_dataset":
        return False
    return bool(dataset.format["type"] != "custom")


class IndexBatches(BatchSampler):
    """The lists of indices that the host's batch sampler deals out, each index with its place.

    What the sampler draws its order from is taken note of when an epoch begins, so that a
    resumed run deals the same order without having seen the epochs before. The batches that
    are over are dealt out empty: the host skips them unread.

    Args:
        inner: The host's batch sampler.
        samples: Samples in one epoch.
        rank: This rank.
        world_size: Number of ranks.
        data: The data set; told the epoch if it wants to know.
        tells_epochs: Whether the samplers are told it, too.

    Attributes:
        drawn_from: The seeds, and the states of all generators when the order of this epoch was
            drawn.
        beginning: Where the first epoch of a resumed run begins.
    """

    def __init__(
        self,
        inner: Any,
        samples: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        data: Any = None,
        tells_epochs: bool = True,
    ) -> None:
        self.inner = inner
        self.drawn_from: dict[str, Any] = {}
        self.beginning: Beginning | None = None
        self._samples, self._rank, self._world_size = samples, rank, world_size
        self._data, self._tells_epochs = data, tells_epochs
        self._epoch = 0
        self._passed: tuple[int, Passed] | None = None

    def trail(self, epoch: int, batches: int) -> dict[str, Any]:
        """Return what the order of an epoch up to a place is to be held against."""
        known = self._passed is not None and self._passed[0] == epoch
        return self._passed[1].trail(batches) if self._passed and known else {}

    @property
    def sampler(self) -> Any:  # type: ignore[override]
        """Itself, which is where the host looks for `set_epoch`."""
        return self

    @property
    def batch_size(self) -> Any:  # type: ignore[override]
        """The batch size of the host's sampler."""
        return getattr(self.inner, "batch_size", None)

    @property
    def drop_last(self) -> bool:  # type: ignore[override]
        """Whether the host's sampler leaves out the last, smaller batch."""
        return bool(getattr(self.inner, "drop_last", False))

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def drawn_by(self) -> str | None:
        """What draws the order from the state of a generator; None: it follows from the epoch."""
        kinds = [type(part) for part in _parts(self.inner) if isinstance(part, _DRAW)]
        return next((k.__name__ for k in kinds if not issubclass(k, SeedableRandomSampler)), None)

    @property
    def seeds(self) -> dict[str, int]:
        """The seeds that the samplers draw the order of each epoch from, by place."""
        parts = enumerate(_parts(self.inner))
        return {str(i): p.initial_seed for i, p in parts if isinstance(p, SeedableRandomSampler)}

    @seeds.setter
    def seeds(self, seeds: Mapping[str, int]) -> None:
        for i, part in enumerate(_parts(self.inner)):
            if isinstance(part, SeedableRandomSampler) and str(i) in seeds:
                part.initial_seed = seeds[str(i)]

    def left_after(self, samples: int) -> int | None:
        """Return how many batches of this rank are left of an epoch after so many samples.

        None: nobody knows, for the batches are made in a way of their own.
        """
        shared = getattr(self.inner, "batch_sampler", self.inner)
        if not isinstance(getattr(shared, "batch_size", None), int) or not hasattr(
            shared, "sampler"
        ):
            return None
        return len(_rest(self.inner, samples))

    def set_epoch(self, epoch: int) -> None:
        """Tell all parts that draw the order which epoch it is."""
        self._epoch = epoch
        told = _parts(self.inner) if self._tells_epochs else []
        for part in (*told, self._data):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[SampleKey]]:  # type: ignore[override]
        begin = self.beginning
        if begin is None or begin.epoch != self._epoch:
            begin = Beginning(self._epoch, 0)
        if "own" in begin.order:
            self._draw_from(begin.order)
        self.drawn_from = self._generators()
        yield from repeat([], begin.batches)
        size = (self.batch_size or 1) * self._world_size
        first = self._epoch * self._samples + (begin.samples or begin.batches * size)
        passed = self._begin_pass(begin)
        for number, indices in enumerate(self._lists(begin, passed)):
            place = first + number * size + self._rank * (self.batch_size or 1)
            yield [SampleKey(index, self._epoch, place + k) for k, index in enumerate(indices)]

    def _begin_pass(self, begin: Beginning) -> Passed | None:
        """Return what keeps digests of the order, where all of it is seen from its beginning."""
        if begin.samples is not None or self._world_size > 1:
            self._passed = None
            return None
        holders = {"batch_sampler": self.inner}
        trail = begin.trail if begin.trail.get("batches") == begin.batches else {}
        passed = Passed("train_dataset", holders, trail)
        self._passed = (self._epoch, passed)
        return passed

    def _lists(self, begin: Beginning, passed: Passed | None) -> Iterator[list[int]]:
        if begin.samples is not None:
            return iter(_rest(self.inner, begin.samples))
        return islice(_counted(iter(self.inner), passed), begin.batches, None)

    def _generators(self) -> dict[str, Any]:
        own = {str(i): generator.get_state() for i, generator in enumerate(self._own_generators())}
        return {"ambient": capture_rng(), "own": own, "seeds": self.seeds}

    def _draw_from(self, states: Mapping[str, Any]) -> None:
        restore_rng(states["ambient"])
        for i, generator in enumerate(self._own_generators()):
            if str(i) in states["own"]:
                generator.set_state(states["own"][str(i)])

    def _own_generators(self) -> list[torch.Generator]:
        found = [getattr(part, "generator", None) for part in _parts(self.inner)]
        return [generator for generator in found if isinstance(generator, torch.Generator)]


def _counted(lists: Iterator[list[int]], passed: Passed | None) -> Iterator[list[int]]:
    for indices in lists:
        if passed is not None:
            passed.add(str(indices))
        yield indices


class _Rest(BatchSampler):
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


def _rest(inner: Any, samples: int) -> Any:
    """Return the rest of an epoch; of one that ranks share, each one's part of it."""
    shared = getattr(inner, "batch_sampler", None)
    if shared is None:
        return _Rest(inner, samples)
    part = copy.copy(inner)
    part.batch_sampler = _Rest(shared, samples)
    return part


def _parts(inner: Any) -> list[Any]:
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
