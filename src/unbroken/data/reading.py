"""Reading a loader that is not ours on and on, epoch after epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import default_collate

from unbroken.data.foreign import END, ForeignLoader
from unbroken.data.randomness import KeyedRandom
from unbroken.data.seen import Seen, read_otherwise
from unbroken.errors import DataError


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


@dataclass
class Reader:
    """A place in the endless chain of epochs of a loader.

    Attributes:
        loader: What is read.
        batches: The rest of the epoch.
        epoch: The epoch.
        taken: Items taken in it.
        seen: The digest of those taken since the epoch began, or since it was set anew.
        drawn_from: What the loader held when the first item of this epoch had come.
        expected: What it must hold then in an epoch that the run had begun to read before it was
            killed: `epoch`, `drawn_from`.
    """

    loader: ForeignLoader
    batches: Iterator[Any]
    epoch: int
    taken: int
    seen: Seen = field(default_factory=Seen)
    drawn_from: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)

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
        """The next `count` items, and the epoch of the first one."""
        items: list[Any] = []
        epoch = self.epoch
        while len(items) < count:
            item = self.read(rng)
            if item is END:
                if grouping.drop_last:
                    items.clear()
                self._next_epoch(count if grouping.drop_last else 1, rng)
                continue
            if not items:
                epoch = self.epoch
            items.append(item)
        return items, epoch

    def _next_epoch(self, least: int, rng: KeyedRandom) -> None:
        if self.taken < least:
            raise DataError(
                type(self.loader.loader).__name__,
                f"epoch {self.epoch} ended too early",
                expected=f"at least {least} items",
                found=self.taken,
                hint="An iterable must give its items again each time it is iterated.",
            )
        self.epoch, self.taken, self.seen = self.epoch + 1, 0, Seen()
        self.batches = self.loader.begin(self.epoch, rng)
