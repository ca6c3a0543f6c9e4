"""An assertion for tests of data loaders: exact continuation from every batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any


def assert_loader_resumes_at_every_step(
    make_loader: Callable[[], Any], *, steps: int | None = None
) -> None:
    """Prove that a data loader continues exactly from its state after each of its batches.

    For each k, the state that a loader had after k batches is loaded into a fresh loader before
    it is iterated, and this one must give the same remaining batches, bit for bit. Going on
    must not change a state that was taken before. The state after the very last batch is left
    out: loaders disagree on whether it is the end of a pass or the beginning of the next. The
    global random generators are neither saved nor set.

    Source: the idea is that of `grain.python.testing` (google/grain).

    Args:
        make_loader: Returns a fresh loader that is iterable; `state_dict` and `load_state_dict`
            are its own, or its iterator's.
        steps: How many batches; None: all.

    Raises:
        AssertionError: A batch differs, is missing or is too much; the message names the first.

    Example:
        >>> class Numbers:
        ...     next = 1
        ...     def __iter__(self):
        ...         while self.next < 4:
        ...             self.next += 1
        ...             yield self.next - 1
        ...     def state_dict(self): return {"next": self.next}
        ...     def load_state_dict(self, state): self.next = state["next"]
        >>> assert_loader_resumes_at_every_step(Numbers)
        >>> Numbers.load_state_dict = lambda self, state: None
        >>> assert_loader_resumes_at_every_step(Numbers)
        Traceback (most recent call last):
        ...
        AssertionError: restored after batch 1: batch 2 is batch 1
    """
    batches, states = _uninterrupted(make_loader(), steps)
    for done, (state, kept) in enumerate(states[:-1], start=1):
        if _digest(state) != _digest(kept):
            raise AssertionError(f"the state after batch {done} was changed by going on")
        ours = _resumed(make_loader(), kept, None if steps is None else steps - done)
        _compare(batches, ours, done)


def _uninterrupted(loader: Any, steps: int | None) -> tuple[list[str], list[tuple[Any, Any]]]:
    """Return the digests of all batches, and after each the state and a copy of it."""
    iterator = iter(loader)
    owner = _owner(loader, iterator)
    batches, states = [], []
    for batch in islice(iterator, steps):
        batches.append(_digest(batch))
        state = owner.state_dict()
        states.append((state, copy.deepcopy(state)))
    if len(batches) < 2:
        raise AssertionError(f"nothing to resume: the loader gave {len(batches)} batches")
    return batches, states


def _resumed(loader: Any, state: Any, steps: int | None) -> list[str]:
    if hasattr(loader, "load_state_dict"):
        loader.load_state_dict(copy.deepcopy(state))
        iterator = iter(loader)
    else:
        iterator = iter(loader)
        _owner(loader, iterator).load_state_dict(copy.deepcopy(state))
    return [_digest(batch) for batch in islice(iterator, steps)]


def _owner(loader: Any, iterator: Iterator[Any]) -> Any:
    """Return which of the two has the state."""
    return loader if hasattr(loader, "state_dict") else iterator


def _compare(batches: Sequence[str], ours: Sequence[str], done: int) -> None:
    where = f"restored after batch {done}"
    for number, (expected, found) in enumerate(zip(batches[done:], ours, strict=False), done + 1):
        if expected != found:
            known = f"batch {batches.index(found) + 1}" if found in batches else "a new one"
            raise AssertionError(f"{where}: batch {number} is {known}")
    if len(batches) - done != len(ours):
        counts = f"expected {len(batches) - done}, found {len(ours)}"
        raise AssertionError(f"{where}: number of batches: {counts}")


def _digest(value: Any) -> str:
    from unbroken.check.recorder.batches import batch_digest
    from unbroken.check.recorder.digests import TensorDigester

    found = batch_digest(value, TensorDigester(sampled=False))
    return "" if found is None else str(found[0])
