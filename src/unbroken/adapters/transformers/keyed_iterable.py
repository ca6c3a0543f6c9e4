"""The batches of an iterable data set, with randomness keyed by epoch and batch."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice, repeat
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from unbroken.adapters.transformers.drawn_lists import AskedFor, draw_again
from unbroken.data import EpochDigests, KeyedRandom, derive_key
from unbroken.data.sources.iterable import reason_to_replay
from unbroken.stored_names import stored_name

_LOADER = "get_train_dataloader"


@stored_name("unbroken.adapters.transformers.passes.KeyedPasses")
class KeyedIterable(IterableDataset[Any]):
    """An iterable data set whose every epoch gives the same batches whenever it is read.

    Reading and collating draw from generators keyed by (seed, epoch, worker, batch), and leave
    the ambient ones as they were. The batches that are over when a run is resumed are read, but
    not collated: their places are filled with None, which the host skips.

    A data set that restores its position exactly (`state_dict`, `load_state_dict`) is not
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
        >>> list(KeyedIterable([1, 2, 3], 0, batch_size=2, collate_fn=tuple))
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
        self._digests: tuple[int, EpochDigests] | None = None
        self._trail: Mapping[str, Any] = {}
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call] # workers that live on
        self._over = (-1, 0)
        self._asked = AskedFor()
        self._reads_epochs_before = self._is_foreign = reads_epochs_before

    def begin(
        self,
        epoch: int,
        batches: int,
        state: Any = None,
        trail: Mapping[str, Any] | None = None,
        order: Mapping[str, Any] | None = None,
    ) -> None:
        """Skip the first batches of an epoch, as a resumed run has used them.

        Args:
            epoch: The epoch.
            batches: So many batches of it are over.
            state: What `state_after` returned for this place.
            trail: What `trail` returned for it.
            order: What `order` was there.
        """
        self._asked.times = [*(order or {}).get("asked", [])]
        self._trail = {} if trail is None else trail
        self._over = (epoch, batches)
        self._state = state

    def _read_epochs_before(self, epoch: int) -> None:
        """Bring an unknown iterable to the beginning of an epoch by reading it again."""
        done, asked = self._trail.get("batches"), dict(enumerate(self._asked.times))
        for before in range(epoch):
            is_last = before == epoch - 1 and self._over in ((epoch, 0), (before, done))
            trail = self._trail if is_last else {}
            digests = EpochDigests(_LOADER, {"dataset": self.dataset}, trail)
            draw_again(self._read(before), asked.get(before), digests.add, digests.end)

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

    @property
    def order(self) -> dict[str, Any]:
        """How many batches of each epoch were asked for, where a resumed run reads them all."""
        return {"asked": [*self._asked.times]} if self._is_foreign else {}

    def trail(self, epoch: int, batches: int) -> dict[str, Any]:
        """Return the digests that the batches of an epoch must match up to a position."""
        known = self._digests is not None and self._digests[0] == epoch
        return self._digests[1].trail(batches) if self._digests and known else {}

    def state_after(self, epoch: int, batches: int) -> Any:
        """Return the data set's state after `batches`; None: it must be read again."""
        return next((s for e, n, s in self._states if (e, n) == (epoch, batches)), None)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration as this epoch."""
        self._epoch.fill_(epoch)
        self._set_epoch_of_dataset(epoch)

    def _set_epoch_of_dataset(self, epoch: int) -> None:
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
            self._set_epoch_of_dataset(epoch)
        over = self._over[1] if self._over[0] == epoch and not self._fills else 0
        if self._reads_epochs_before and not self._follows_epochs():
            self._read_epochs_before(epoch)
        self._reads_epochs_before = False
        first = over if self._state is not None and self._states.maxlen else 0
        self._digests = None
        if first:
            self.dataset.load_state_dict(copy.deepcopy(self._state))
        with KeyedRandom() as rng:
            rng.seed(derive_key(self._seed, "pass", epoch, mine))
            samples = iter(self.dataset)
        yield from repeat(None, first)
        digests = self._begin_digests(epoch) if worker is None and not first else None
        self._asked.begin(epoch)
        for number in count(first):
            self._asked.times[epoch] += 1
            with KeyedRandom() as rng:
                rng.seed(derive_key(self._seed, "batch of a pass", epoch, mine, number))
                batch = list(islice(samples, self._batch_size))
                if not batch or (self._drop_last and len(batch) < self._batch_size):
                    if digests is not None:
                        digests.end()
                    return
                if digests is not None:
                    digests.add(batch)
                # Workers take turns; one that has ended makes the others come earlier, not later.
                is_over = number * of_all + mine < over
                data = None if is_over else self._collate(batch)
            if self._states.maxlen:
                self._states.append((epoch, number + 1, copy.deepcopy(self.dataset.state_dict())))
            yield data

    def _begin_digests(self, epoch: int) -> EpochDigests:
        """Return the digests of an epoch that this process reads from its beginning."""
        trail = self._trail if self._over == (epoch, self._trail.get("batches")) else {}
        where = _LOADER if self._is_foreign else "train_dataset"
        digests = EpochDigests(where, {"dataset": self.dataset}, trail)
        self._digests = (epoch, digests)
        return digests
