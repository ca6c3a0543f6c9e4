"""Batches of an iterable data set, with randomness keyed by epoch and batch."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice, repeat
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from unbroken.data import KeyedRandom, Passed, derive_key
from unbroken.data.replay import reason_to_replay

_LOADER = "get_train_dataloader"


class KeyedPasses(IterableDataset[Any]):
    """Passes over an iterable data set, each the same whenever the same epoch is read.

    Reading and collating draw from generators keyed by (seed, epoch, worker, batch), and leave
    the ambient ones as they were. The batches that are over when a run is resumed are read, but
    not collated: their places are filled with None, which the host skips.

    A data set that brings itself to its place exactly (`state_dict`, `load_state_dict`) is not
    read again, where this process reads it; what a worker has read is out of reach.

    Args:
        dataset: The user's data set, or this rank's part of it.
        seed: The seed of the data.
        batch_size: Samples in a batch.
        collate_fn: Makes a batch of a list of samples.
        drop_last: Leave out a last batch that is smaller.
        fills: Whether batches that are over are made all the same.
        remembers: After how many of the last batches the data set's state is kept.
        reads_epochs_before: Whether a resumed run reads all epochs from the first: nothing is
            known of the data set, and it is not told the epoch.

    Example:
        >>> list(KeyedPasses([1, 2, 3], 0, batch_size=2, collate_fn=tuple))
        [(1, 2), (3,)]
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        *,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
        drop_last: bool = False,
        fills: bool = False,
        remembers: int = 0,
        reads_epochs_before: bool = False,
    ) -> None:
        self.dataset = dataset
        self._fills = fills
        keeps = remembers if reason_to_replay(dataset) is None else 0
        self._states: deque[tuple[int, int, Any]] = deque(maxlen=keeps)
        self._state: Any = None
        self._seed, self._batch_size, self._drop_last = seed, batch_size, drop_last
        self._collate = collate_fn
        self._passed: tuple[int, Passed] | None = None
        self._trail: Mapping[str, Any] = {}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call] # workers that live on
        self._over = (-1, 0)
        self._reads_epochs_before = self._is_foreign = reads_epochs_before

    def begin(
        self, epoch: int, batches: int, state: Any = None, trail: Mapping[str, Any] | None = None
    ) -> None:
        """Take note that a resumed run skips so many batches of an epoch.

        Args:
            epoch: The epoch.
            batches: So many batches of it are over.
            state: What `state_after` returned for this place.
            trail: What `trail` returned for it.
        """
        self._trail = {} if trail is None else trail
        self._over = (epoch, batches)
        self._state = state

    def _read_epochs_before(self, epoch: int) -> None:
        """Bring an iterable of no known kind to the beginning of an epoch: by reading it again."""
        done = self._trail.get("batches")
        whole = self._trail if not hasattr(self.dataset, "__len__") or done == len(self) else {}
        for before in range(epoch):
            is_last = before == epoch - 1 and self._over in ((epoch, 0), (before, done))
            passed = Passed(_LOADER, {"dataset": self.dataset}, whole if is_last else {})
            for batch in self._read(before):
                passed.add(batch)

    def _read(self, epoch: int) -> Iterator[Any]:
        """Yield the batches of a whole epoch, keyed as they are in it."""
        with KeyedRandom() as rng:
            rng.seed(derive_key(self._seed, "pass", epoch, 0))
            samples = iter(self.dataset)
        for number in count():
            with KeyedRandom() as rng:
                rng.seed(derive_key(self._seed, "batch of a pass", epoch, 0, number))
                batch = list(islice(samples, self._batch_size))
            if not batch:
                return
            yield batch

    def trail(self, epoch: int, batches: int) -> dict[str, Any]:
        """Return what the batches of an epoch up to a place are to be held against."""
        known = self._passed is not None and self._passed[0] == epoch
        return self._passed[1].trail(batches) if self._passed and known else {}

    def state_after(self, epoch: int, batches: int) -> Any:
        """Return the data set's state after so many batches; None: it must be read again."""
        return next((s for e, n, s in self._states if (e, n) == (epoch, batches)), None)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next pass as this one."""
        self._epoch.fill_(epoch)
        self._tell_epoch(epoch)

    def _tell_epoch(self, epoch: int) -> None:
        if callable(getattr(self.dataset, "set_epoch", None)):
            self.dataset.set_epoch(epoch)

    def _follows_epochs(self) -> bool:
        return callable(getattr(self.dataset, "set_epoch", None))

    def __len__(self) -> int:
        samples = len(self.dataset)
        size = self._batch_size
        return samples // size if self._drop_last else -(-samples // size)

    def __iter__(self) -> Iterator[Any]:
        epoch, worker = int(self._epoch), get_worker_info()
        mine, of_all = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            self._tell_epoch(epoch)
        over = self._over[1] if self._over[0] == epoch and not self._fills else 0
        if self._reads_epochs_before and not self._follows_epochs():
            self._read_epochs_before(epoch)
        self._reads_epochs_before = False
        first = over if self._state is not None and self._states.maxlen else 0
        self._passed = None
        if first:
            self.dataset.load_state_dict(copy.deepcopy(self._state))
        with KeyedRandom() as rng:
            rng.seed(derive_key(self._seed, "pass", epoch, mine))
            samples = iter(self.dataset)
        yield from repeat(None, first)
        passed = self._begin_pass(epoch) if worker is None and not first else None
        for number in count(first):
            with KeyedRandom() as rng:
                rng.seed(derive_key(self._seed, "batch of a pass", epoch, mine, number))
                batch = list(islice(samples, self._batch_size))
                if not batch or (self._drop_last and len(batch) < self._batch_size):
                    return
                if passed is not None:
                    passed.add(batch)
                # Workers take turns; one that has ended makes the others come earlier, not later.
                is_over = number * of_all + mine < over
                data = None if is_over else self._collate(batch)
            if self._states.maxlen:
                self._states.append((epoch, number + 1, copy.deepcopy(self.dataset.state_dict())))
            yield data

    def _begin_pass(self, epoch: int) -> Passed:
        """Return what keeps digests of a pass that this process reads from its beginning."""
        trail = self._trail if self._over == (epoch, self._trail.get("batches")) else {}
        where = _LOADER if self._is_foreign else "train_dataset"
        passed = Passed(where, {"dataset": self.dataset}, trail)
        self._passed = (epoch, passed)
        return passed
