"""One pass after another over a loader that is not ours, under keyed randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch

from unbroken.data.asking import has, is_of
from unbroken.data.keys import derive_key
from unbroken.data.randomness import KeyedRandom
from unbroken.data.seen import drawn_from
from unbroken.data.workers import leave_signals_of
from unbroken.errors import DataError

END = object()  # what `ForeignLoader.next` gives at the end of an epoch


class ForeignLoader:
    """A loader or iterable that can be read again and again, each pass the same for its epoch.

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
        _require_repeatable(loader)
        base = getattr(loader, "base_dataloader", None) if is_of(loader, "accelerate") else None
        leave_signals_of(loader if base is None else base)
        for part in _parts(loader):
            if type(part).__name__ == "SeedableRandomSampler":  # of accelerate: by seed and epoch
                part.initial_seed = derive_key(seed, "loader generator") >> 1

    def begin(self, epoch: int, rng: KeyedRandom, state: Any = None) -> Iterator[Any]:
        """Return an iterator over one epoch; with the loader's own state, over the rest of it."""
        _forget_passes(self.loader, epoch)
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
        return iter(self.loader() if _is_factory(self.loader) else self.loader)

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

    def drawn_from(self) -> dict[str, str]:
        """Return digests of the generators and weights that the loader holds now."""
        return drawn_from(self.loader)

    def state(self) -> Any:
        """Return the loader's own state, a copy."""
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


def _forget_passes(loader: Any, epoch: int) -> None:
    """Let a loader know of no pass before this one.

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
