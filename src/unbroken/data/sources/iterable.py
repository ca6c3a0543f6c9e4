"""Iterate over a user's loader epoch after epoch, with keyed randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
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

from unbroken.data.keyed_rng import KeyedRandom, derive_key
from unbroken.data.sources.batch_digests import BatchDigest, drawn_from, read_otherwise
from unbroken.data.sources.map_style import is_deterministic
from unbroken.data.worker_signals import leave_signals_of, shut_down
from unbroken.errors import DataError
from unbroken.introspection import answers_anything, has, is_of

END = object()  # returned by `ForeignLoader.next` at the end of an epoch


class ForeignLoader:
    """A loader or iterable that can be read repeatedly; each epoch gives the same batches.

    `iter()` runs with the global generators keyed by (seed, epoch), each `next()` keyed by
    (seed, epoch, batch). The loader's own torch generators, and those of its samplers, are
    seeded at the begin of a pass, and `set_epoch(epoch)` is called wherever it exists. So a
    sampler that shuffles gives the same order whenever the same epoch is read.

    Args:
        loader: An iterable, or a function that returns one.
        seed: The seed of the run.

    Raises:
        DataError: It cannot be read twice, or not twice in the same way.

    Example:
        >>> loader = ForeignLoader([[1, 2], [3]], seed=0)
        >>> with KeyedRandom() as rng:
        ...     batches = loader.begin(0, rng)
        ...     loader.next(batches, 0, 0, rng), loader.next(batches, 0, 1, rng)
        ([1, 2], [3])
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader = loader
        self.seed = seed
        self.on_workers: Callable[[], object] = lambda: None
        self.on_epoch: Callable[[int], object] = lambda _: None
        self._begun: Iterator[Any] | None = None
        _require_repeatable(loader)
        base = getattr(loader, "base_dataloader", None) if is_of(loader, "accelerate") else None
        leave_signals_of(loader if base is None else base)
        for part in _parts(loader):
            if type(part).__name__ == "SeedableRandomSampler":  # of accelerate: by seed and epoch
                part.initial_seed = derive_key(seed, "loader generator") >> 1

    def begin(self, epoch: int, rng: KeyedRandom, state: Any = None) -> Iterator[Any]:
        """Return an iterator over one epoch; with the loader's own state, over the rest of it."""
        self.on_epoch(epoch)
        _reset_epochs(self.loader, epoch)
        for part in _parts(self.loader):
            if has(part, "set_epoch") and callable(part.set_epoch):
                part.set_epoch(epoch)
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(derive_key(self.seed, "loader generator", epoch))
        rng.seed(derive_key(self.seed, "loader", epoch))
        if state is not None:
            self.loader.load_state_dict(deepcopy(state))
        if getattr(self.loader, "num_workers", 0):
            self.on_workers()
        self._begun = iter(self.loader() if _is_factory(self.loader) else self.loader)
        return self._begun

    def next(self, batches: Iterator[Any], epoch: int, number: int, rng: KeyedRandom) -> Any:
        """Return the batch with that number in the epoch, or END."""
        rng.seed(derive_key(self.seed, "loader", epoch, number))
        return next(batches, END)

    def facts(self) -> dict[str, Any]:
        """Return what the order and the randomness of an epoch depend on, as far as it shows."""
        facts = {
            "n": _length(getattr(self.loader, "dataset", None)),
            "length": self.length,
            "batch_size": getattr(self.loader, "batch_size", None),
            # With workers a sampler draws its order in iter(), without them in next().
            "num_workers": getattr(self.loader, "num_workers", None),
        }
        return {name: fact for name, fact in facts.items() if isinstance(fact, int | None)}

    @property
    def order_parts(self) -> dict[str, Any]:
        """What gives an epoch its order, by name: samplers, and what is iterated over itself."""
        found = {f"{n}:{type(one).__name__}": one for n, one in enumerate(_parts(self.loader))}
        dataset, workers = (
            getattr(self.loader, "dataset", None),
            getattr(self.loader, "num_workers", 0),
        )
        is_apart = not isinstance(dataset, IterableDataset) or workers
        return {name: one for name, one in found.items() if one is not dataset or not is_apart}

    def end(self) -> None:
        """Let the workers of the pass that was begun last end."""
        begun, self._begun = self._begun, None
        if begun is not None:
            shut_down(begun)

    @property
    def seeded(self) -> list[torch.Generator]:
        """The generators that are seeded at the begin of each pass."""
        found = (getattr(part, "generator", None) for part in _parts(self.loader))
        return [one for one in found if isinstance(one, torch.Generator)]

    def drawn_from(self) -> dict[str, str]:
        """Return digests of the generators and weights that the loader holds now."""
        return drawn_from(self.loader)

    def state(self) -> Any:
        """Return a copy of the loader's own state."""
        return deepcopy(self.loader.state_dict())

    @property
    def length(self) -> int | None:
        """Batches in one epoch, where the loader knows."""
        return _length(self.loader)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # it has none, or says so when asked
        return None


def _parts(loader: Any) -> list[Any]:
    """The loader and what it draws its order from, each once."""
    found: dict[int, Any] = {}
    waiting = [loader, getattr(loader, "dataset", None)]
    while waiting:
        part = waiting.pop(0)
        if part is None or id(part) in found:
            continue
        found[id(part)] = part
        if part is loader or (has(part, "__iter__") and not has(part, "__getitem__")):
            waiting += [getattr(part, name, None) for name in ("sampler", "batch_sampler")]
    return list(found.values())


def _reset_epochs(loader: Any, epoch: int) -> None:
    """Make a loader forget the epochs it gave before.

    Accelerate's count their passes, and shuffle by the count; torchdata's may hold an iterator
    that was made when somebody asked for its state.
    """
    if is_of(loader, "accelerate"):
        loader.iteration = epoch
        loader = getattr(loader, "base_dataloader", None)
    if is_of(loader, "torchdata") and has(loader, "load_state_dict"):
        loader.load_state_dict({})


def _is_factory(loader: Any) -> bool:
    return callable(loader) and not has(loader, "__iter__")


def _require_repeatable(loader: Any) -> None:
    where = type(loader).__name__
    if not _is_factory(loader) and not has(loader, "__iter__"):
        raise DataError(
            where,
            "neither a data set nor an iterable of batches",
            hint="Give something with __getitem__ and __len__, or with __iter__.",
        )
    if has(loader, "__next__") and not has(loader, "load_state_dict"):
        raise DataError(
            where,
            "a generator cannot be started again, so a killed run could not be continued",
            hint="Give the function that makes it, or a data set.",
        )
    if getattr(loader, "in_order", True) is False:
        raise DataError(
            where,
            "in_order=False gives batches in the order in which workers happen to finish",
            hint="Build the loader with in_order=True.",
        )
    if getattr(loader, "persistent_workers", False) is True:
        raise DataError(
            where,
            "persistent_workers=True keeps the workers' random state from "
            "one epoch to the next, which nothing can replay",
            hint="Build the loader with persistent_workers=False, or give its data set.",
        )


# Reading a loader that is not ours on and on, epoch after epoch.


@dataclass(frozen=True)
class Grouping:
    """How micro-batches are made of what an iterable gives.

    Attributes:
        samples: The iterable gives single samples, the same on all ranks, which are dealt here;
            else it gives whole micro-batches of this rank.
        collate: Makes a micro-batch of a list of samples.
        drop_last: Leave out the samples at an epoch's end that fill no micro-batch; else one may
            span two epochs.
    """

    samples: bool = False
    collate: Callable[[list[Any]], Any] = default_collate
    drop_last: bool = False


class EpochOverError(Exception):
    """An epoch has no more micro-batches, and the next one is not to be begun."""


@dataclass
class Reader:
    """A position in the endless chain of epochs of a loader.

    Attributes:
        loader: What is read.
        batches: The rest of the epoch.
        epoch: The epoch.
        taken: Items taken in it.
        seen: The digest of those taken since the epoch began, or since it was set anew.
        drawn_from: What the loader held when the first item of this epoch had come.
        expected: What it must hold then in an epoch that the run had begun to read before it was
            killed: `epoch`, `drawn_from`.
        is_bounded: Whether it ends with the epoch, and begins no other one.
        gives_rest: Whether it then gives the last items, fewer than were asked for.
    """

    loader: ForeignLoader
    batches: Iterator[Any]
    epoch: int
    taken: int
    seen: BatchDigest = field(default_factory=BatchDigest)
    drawn_from: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    is_bounded: bool = False
    gives_rest: bool = False

    def read(self, rng: KeyedRandom) -> Any:
        """Return the next item of this epoch, or END."""
        item = self.loader.next(self.batches, self.epoch, self.taken, rng)
        if item is not END:
            self.seen.add(item)
            if self.taken == 0:
                self.drawn_from = self.loader.drawn_from()
                if self.expected.get("epoch") == self.epoch:
                    self._hold_against(self.expected["drawn_from"])
            self.taken += 1
        return item

    def _hold_against(self, before: Mapping[str, str]) -> None:
        for name, digest in before.items():
            if (now := self.drawn_from.get(name, digest)) != digest:
                where = type(self.loader.loader).__name__
                what = f"epoch {self.epoch} was drawn from another state of {name}"
                raise read_otherwise(where, what, digest, now)

    def take(self, count: int, grouping: Grouping, rng: KeyedRandom) -> tuple[list[Any], int]:
        """The next `count` items, fewer at the end of a bounded epoch; the epoch of the first.

        Raises:
            EpochOverError: A bounded epoch is over.
        """
        items: list[Any] = []
        epoch = self.epoch
        while len(items) < count:
            item = self.read(rng)
            if item is END and self.is_bounded:
                self._require_items(1)
                if items and self.gives_rest:
                    break
                raise EpochOverError
            if item is END:
                if grouping.drop_last:
                    items.clear()
                self._next_epoch(count if grouping.drop_last else 1, rng)
                continue
            if not items:
                epoch = self.epoch
            items.append(item)
        return items, epoch

    def _require_items(self, least: int) -> None:
        if self.taken < least:
            raise DataError(
                type(self.loader.loader).__name__,
                f"epoch {self.epoch} ended too early",
                expected=f"at least {least} items",
                found=self.taken,
                hint="An iterable must give its items again each time it is iterated.",
            )

    def _next_epoch(self, least: int, rng: KeyedRandom) -> None:
        self._require_items(least)
        self.epoch, self.taken, self.seen = self.epoch + 1, 0, BatchDigest()
        self.batches = self.loader.begin(self.epoch, rng)


# Which loaders must be read again: their own state would not be exact, or is not there.


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
