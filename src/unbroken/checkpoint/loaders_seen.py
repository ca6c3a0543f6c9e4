"""Which loaders a hand-written loop trains on: seen by what happens between their batches.

A loader counts where a backward pass or an optimizer's step follows its batch: between two of its
batches, or as the last one that gave any. One that is read without that, in evaluation mode or
without gradients is no training data.
"""

# ruff: noqa: SLF001 (PyTorch has no public names for what a loader's iterator holds)

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.utils.data import dataloader

from unbroken.data import KeyedDataset

Sign = tuple[object, ...]
"""What changes with each backward pass and each step of an optimizer."""


@dataclass
class _Pass:
    """One iterator of a loader."""

    sign: Sign
    given: int
    steps: int
    idle: bool = False


class LoadersSeen:
    """Notes which data sets are trained on through a loader that was not given.

    Args:
        sign: Returns what changes with each backward pass and each step.
        trains: Whether a batch that is read now could be one to train on.
        given: Returns how many batches registered sources have handed out.
    """

    def __init__(
        self, sign: Callable[[], Sign], trains: Callable[[], bool], given: Callable[[], int]
    ) -> None:
        self.trained: list[Any] = []
        self._sign, self._trains, self._given = sign, trains, given
        self._passes: WeakKeyDictionary[Any, _Pass] = WeakKeyDictionary()
        self._last: tuple[Any, _Pass] | None = None
        self._steps = 0

    def gave(self, batches: Any) -> None:
        """Take note of a batch that an iterator gives."""
        if isinstance(batches._dataset, KeyedDataset) or not self._trains():
            return
        before, sign = self._passes.get(batches), self._sign()
        now = _Pass(sign, self._given(), self._steps)
        if before is not None and before.sign != sign and self._is_for_steps(before, now):
            self._add(batches._dataset)
        now.idle = before is not None and before.sign == sign
        self._passes[batches] = now
        self._last = (batches._dataset, now)

    def ended(self, batches: Any) -> None:
        """Take note that an iterator has no more batches."""
        last = self._passes.pop(batches, None)
        if last is None:
            return
        now = _Pass(self._sign(), self._given(), self._steps)
        if last.sign == now.sign:
            last.idle = True
        elif self._is_for_steps(last, now):
            self._add(batches._dataset)

    def _is_for_steps(self, before: _Pass, now: _Pass) -> bool:
        """Return whether a batch was for what happened since, and not one of registered data.

        Beside those, one that gives a batch for each step is trained on, too.
        """
        return before.given == now.given or now.steps - before.steps <= 1

    def stepped(self) -> None:
        """Take note, before a step, that what was read last is what it is for."""
        if self._last is not None:
            dataset, one = self._last
            if not one.idle and one.given == self._given():
                self._add(dataset)
        self._last, self._steps = None, self._steps + 1

    def _add(self, dataset: Any) -> None:
        if not any(one is dataset for one in self.trained):
            self.trained.append(dataset)


_open: WeakSet[LoadersSeen] = WeakSet()
_replaced: list[tuple[type, Any, Any]] = []
_inside = threading.local()


def watch(seen: LoadersSeen) -> None:
    """Let it hear of all loaders of torch's class in this process, until `unwatch`."""
    _open.add(seen)
    if not _replaced:
        for kind in _iterators(dataloader._BaseDataLoaderIter):
            plain = vars(kind)["__next__"]
            heard = _heard(plain)
            kind.__next__ = heard  # type: ignore[attr-defined]
            _replaced.append((kind, plain, heard))


def unwatch(seen: LoadersSeen) -> None:
    """Let it hear of nothing more."""
    _open.discard(seen)
    if _open:
        return
    for kind, plain, heard in _replaced:
        if vars(kind).get("__next__") is heard:
            kind.__next__ = plain  # type: ignore[attr-defined]
    _replaced.clear()


def _iterators(kind: type) -> Iterator[type]:
    """Yield the classes of iterators that have a `__next__` of their own."""
    if "__next__" in vars(kind):
        yield kind
    kinds: list[type] = kind.__subclasses__()
    for one in kinds:
        yield from _iterators(one)


def _heard(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def __next__(self: Any) -> Any:  # noqa: N807 (takes the place of it)
        if getattr(_inside, "one", None) is self or torch.compiler.is_compiling():
            return plain(self)  # of a class whose own calls this one
        outer, _inside.one = getattr(_inside, "one", None), self
        try:
            batch = plain(self)
        except StopIteration:
            for seen in list(_open):
                seen.ended(self)
            raise
        finally:
            _inside.one = outer
        for seen in list(_open):
            seen.gave(self)
        return batch

    return __next__
