"""What a trainer needs of data: micro-batches from any position, and the position as state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

from unbroken.data.order import BatchShape
from unbroken.errors import DataError


@dataclass(frozen=True)
class Position:
    """How much of the data has been *used*: trained on, not merely prefetched.

    A map-style data set needs `samples` alone; the rest belongs to loaders and iterables.

    Attributes:
        samples: Samples used so far by all ranks together.
        epoch: The pass over the loader that is under way, from 0.
        taken: Batches (samples, for an iterable of samples) taken from the loader in this pass.
        pending: Micro-batches used since the last whole optimizer step.
        loader_state: The loader's own state, where it has one.
        trail: Digests of what was read, to check a replayed loader against.
    """

    samples: int = 0
    epoch: int = 0
    taken: int = 0
    pending: int = 0
    loader_state: Any = None
    trail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of this rank.

    Attributes:
        data: What the collator or the loader gave.
        samples: Number of samples in it, on this rank.
        epoch: The epoch of its first sample, from 0.
        first_position: The global position of its first sample.
        after: The position once this micro-batch has been used on all ranks.
    """

    data: Any
    samples: int
    epoch: int
    first_position: int
    after: Position


@runtime_checkable
class BatchSource(Protocol):
    """Micro-batches from any position on, endless over epochs; its state is the position.

    It says nothing about when to stop. A loop over optimizer steps reads:

        batches = source.iterate()
        while step < max_steps:
            for micro in islice(batches, source.micro_batches_left()):
                loss(micro.data).backward()
                source.used(micro)          # only now the position moves
            optimizer.step()

    `state_dict()` is right at any moment, inside an accumulation window too, however many
    batches are prefetched.

    Attributes:
        position: What has been used so far.
        shape: How a global batch is cut.
        steps_per_epoch: Optimizer steps in one epoch, exactly; None where nobody knows.
        samples_per_epoch: Samples in one epoch, where positions are counted in samples alone.
    """

    position: Position
    shape: BatchShape

    @property
    def steps_per_epoch(self) -> Fraction | None:
        """Optimizer steps in one epoch, exactly; None where nobody knows."""

    @property
    def samples_per_epoch(self) -> int | None:
        """Samples in one epoch, where positions are counted in samples alone; else None."""

    def iterate(self, position: Position | None = None) -> Iterator[MicroBatch]:
        """Return the micro-batches from a position on (by default: from where it stands).

        An iterator that was returned before is closed first.
        """

    def used(self, micro: MicroBatch) -> None:
        """Take note that a micro-batch has been used: the position is now `micro.after`."""

    def micro_batches_left(self) -> int:
        """Return how many micro-batches are left in the current optimizer step: 1 to A."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the facts that it depends on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position, or raise DataError if the facts differ."""

    def close(self) -> None:
        """Stop reading and shut the workers down; the position stays."""


@runtime_checkable
class EpochSource(BatchSource, Protocol):
    """A source that can be read epoch by epoch: nothing of the next one is read before it begins.

    A loop over epochs may change what the next one is drawn from, between the two.
    """

    @property
    def epoch(self) -> int:
        """The epoch that the position lies in; at the edge of two, the next one."""

    def rest_of_epoch(self, epoch: int) -> Iterator[MicroBatch]:
        """Return the micro-batches of this epoch that are still to come.

        Args:
            epoch: The epoch that the position lies in, or whose end it is.
        """

    def end_epoch(self, epoch: int) -> None:
        """Go to the beginning of the next epoch, whatever of this one was left out."""


class RunningIterator:
    """The running iterator over the data; beginning another one closes it.

    Attributes:
        handed_out: Micro-batches that all iterators have given.
        on_batch: Called with the data of each; may be set.
    """

    def __init__(self) -> None:
        self.handed_out = 0
        self.on_batch: Callable[[Any], object] = lambda _: None
        self._running: Generator[MicroBatch, None, None] | None = None

    def begin(self, batches: Generator[MicroBatch, None, None]) -> Iterator[MicroBatch]:
        """Close the previous iterator, and return this one."""
        self.close()
        self._running = batches
        return self._counted(batches)

    def _counted(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            self.handed_out += 1
            self.on_batch(batch.data)
            yield batch

    def close(self) -> None:
        """Close the iterator; this ends its loader and the worker processes."""
        if self._running is not None:
            self._running.close()
            self._running = None


MAY_CHANGE_WITH_DATA = frozenset({"n", "epoch_size", "fingerprint", "length", "trail"})
"""What may differ in the state of a source where other data are meant."""


def require_same_facts(
    stored: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str] = ()
) -> None:
    """Raise unless every fact of a saved position equals that of the source.

    Args:
        stored: The saved state; more entries than facts are fine.
        now: The facts of the live source.
        may_change: Facts that need not be the same.

    Raises:
        DataError: A fact differs or is missing; the first one is named.

    Example:
        >>> require_same_facts({"n": 10, "samples": 4}, {"n": 10})
    """
    if not isinstance(stored, Mapping):
        raise DataError("data", "the saved position is none", found=repr(stored)[:80])
    for name, value in now.items():
        found = stored.get(name)
        if name in may_change:
            continue
        if found != value or (found is None) != (value is None):
            raise DataError(
                f"data.{name}",
                "the saved position was made with another value",
                expected=f"{found!r}, as saved",
                found=repr(value),
                hint=_HINTS.get(name, "Use the value of the saved run, or start a new run."),
            )


def require_counts(stored: Mapping[str, Any], *names: str) -> None:
    """Raise unless these entries of a saved position are counts.

    Raises:
        DataError: One is missing, or something else.

    Example:
        >>> require_counts({"samples": 4}, "samples")
    """
    for name in names:
        found = stored.get(name)
        if type(found) is not int or not 0 <= found < 2**63:
            what = "the saved position is none"
            raise DataError(f"data.{name}", what, expected="a count", found=repr(found)[:80])


_HINTS = {
    "n": "The data set has another length than when the position was saved, so its order "
    "would be another one. Give the same data, or start a new run.",
    "fingerprint": "The data set has other contents than when the position was saved. "
    "Give the same data, or start a new run.",
    "num_workers": "A loader's order and randomness depend on its workers. Give as many; or start "
    "a new run with the data set in place of the loader: then they may change.",
    "kind": "The position was saved with another kind of data. Give the same kind, "
    "or start a new run.",
}
