"""The host's training loader rebuilt around batches that continue exactly at any place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard, SeedableRandomSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    default_data_collator,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from unbroken.adapters.transformers.drawn_lists import (
    AskedFor,
    draw_again,
    drawn_apart,
    parts_of,
    rest_of,
)
from unbroken.adapters.transformers.keyed_iterable import KeyedIterable
from unbroken.adapters.transformers.position import DataPosition
from unbroken.capture import capture_rng, restore_rng
from unbroken.checkpoint import Difference
from unbroken.data import EpochDigests, KeyedDataset, SampleKey
from unbroken.data.worker_signals import leaving_signals
from unbroken.errors import ConfigError
from unbroken.fingerprint import keeps_attributes
from unbroken.stored_names import stored_name

# Batches of a map-style data set: in the host's order, from any position, keyed.


_DRAW = (LengthGroupedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class Beginning:
    """Where in an epoch a resumed run begins.

    Attributes:
        epoch: The epoch.
        batches: So many batches of it are over, as the host's loop counts them.
        samples: Begin after so many samples instead, where batches were cut otherwise before.
        order: What the order of the epoch was drawn from, as `IndexBatches.order` had it.
        saved_order: The same of the epoch that the checkpoint was saved in.
        data: The state of an iterable data set there, as `KeyedIterable.state_after` had it.
        seeds: As `IndexBatches.seeds` had them.
        trail: What the batches that are over are held against, as `EpochDigests` has it.
    """

    epoch: int
    batches: int
    samples: int | None = None
    order: Mapping[str, Any] = field(default_factory=dict)
    saved_order: Mapping[str, Any] = field(default_factory=dict)
    data: Any = None
    seeds: Mapping[str, int] = field(default_factory=dict)
    trail: Mapping[str, Any] = field(default_factory=dict)


@stored_name("unbroken.adapters.transformers.batches.Records")
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


@stored_name("unbroken.adapters.transformers.batches.IndexBatches")
class IndexBatches(BatchSampler):
    """The lists of indices that the host's batch sampler deals out, each with its position.

    What the sampler draws its order from is taken note of when an epoch begins, so that a
    resumed run deals the same order without having seen the epochs before. The batches that
    are over are dealt out empty: the host skips them unread.

    Args:
        inner: The host's batch sampler.
        samples: Samples in one epoch.
        rank: This rank.
        world_size: Number of ranks.
        data: The data set; told the epoch if it wants to know.
        sets_epochs: Whether the samplers get it, too.

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
        sets_epochs: bool = True,
    ) -> None:
        self.inner = inner
        self.drawn_from: dict[str, Any] = {}
        self.beginning: Beginning | None = None
        self._samples, self._rank, self._world_size = samples, rank, world_size
        self._data, self._sets_epochs, self._epoch = data, sets_epochs, 0
        self._digests: tuple[int, EpochDigests] | None = None
        self._own = [part for part in parts_of(inner) if keeps_attributes(part)]
        self._asked = AskedFor()
        self._to_catch_up: Beginning | None = None

    def begin(self, beginning: Beginning) -> None:
        """Let the first epoch of a resumed run begin there."""
        self.beginning = self._to_catch_up = beginning
        self.seeds = beginning.seeds

    def trail(self, epoch: int, batches: int) -> dict[str, Any]:
        """Return the digests that the order of an epoch must match up to a position."""
        known = self._digests is not None and self._digests[0] == epoch
        return self._digests[1].trail(batches) if self._digests and known else {}

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
        kinds = [type(part) for part in parts_of(self.inner) if isinstance(part, _DRAW)]
        return next((k.__name__ for k in kinds if not issubclass(k, SeedableRandomSampler)), None)

    @property
    def seeds(self) -> dict[str, int]:
        """The seeds that the samplers draw the order of each epoch from, by number."""
        parts = enumerate(parts_of(self.inner))
        return {str(i): p.initial_seed for i, p in parts if isinstance(p, SeedableRandomSampler)}

    @seeds.setter
    def seeds(self, seeds: Mapping[str, int]) -> None:
        for i, part in enumerate(parts_of(self.inner)):
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
        return len(rest_of(self.inner, samples))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of all parts that draw the order."""
        self._epoch = epoch
        parts = parts_of(self.inner) if self._sets_epochs else []
        for part in (*parts, self._data):
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[SampleKey]]:  # type: ignore[override]
        begin = self.beginning
        if begin is None or begin.epoch != self._epoch:
            begin = Beginning(self._epoch, 0)
        self._catch_up()
        if "own" in begin.order:
            self._draw_from(begin.order)
        self.drawn_from = self._generators()
        self._asked.begin(self._epoch)
        yield from repeat([], begin.batches)
        size = (self.batch_size or 1) * self._world_size
        first = self._epoch * self._samples + (begin.samples or begin.batches * size)
        digests = self._begin_digests(begin)
        for number, indices in enumerate(self._lists(begin, digests)):
            place = first + number * size + self._rank * (self.batch_size or 1)
            yield [SampleKey(index, self._epoch, place + k) for k, index in enumerate(indices)]

    def _catch_up(self) -> None:
        """Draw the orders of the epochs before: a sampler of the user's may count them itself."""
        begin, self._to_catch_up = self._to_catch_up, None
        if begin is None or all(hasattr(part, "set_epoch") for part in self._own):
            return
        now, saved = self._generators(), begin.saved_order
        self._asked.times = [*saved.get("asked", [])]
        for epoch in range(self._epoch):
            is_known = saved.get("epoch") == epoch
            if is_known:
                self._draw_from(saved)
            holders = {"batch_sampler": self.inner}
            digests = EpochDigests("train_dataset", holders, begin.trail if is_known else {})
            times = dict(enumerate(self._asked.times)).get(epoch, len(self.inner) + 1)
            draw_again(map(str, self._drawn()), times, digests.add, digests.end)
        self._draw_from(now)

    def _drawn(self) -> Iterator[list[int]]:
        """Return the lists of an epoch; those of a sampler of the user's are drawn apart."""
        lists = iter(self.inner)
        return drawn_apart(lists) if self._own else lists

    @property
    def order(self) -> dict[str, Any]:
        """What the order of this epoch was drawn from, and how many lists of each were drawn."""
        if not (self._own and self.drawn_from):
            return self.drawn_from
        asked = self._asked.times
        return self.drawn_from | {"epoch": len(asked) - 1, "asked": [*asked]}

    def _begin_digests(self, begin: Beginning) -> EpochDigests | None:
        """Return the digests of the order, where it is read from its beginning."""
        if begin.samples is not None:
            self._digests = None
            return None
        holders = {"batch_sampler": self.inner}
        trail = begin.trail if begin.trail.get("batches") == begin.batches else {}
        digests = EpochDigests("train_dataset", holders, trail)
        self._digests = (self._epoch, digests)
        return digests

    def _lists(self, begin: Beginning, digests: EpochDigests | None) -> Iterator[list[int]]:
        if begin.samples is not None:
            return iter(rest_of(self.inner, begin.samples))
        lists = self._asked.count(self._drawn())
        return islice(_counted(lists, digests), begin.batches, None)

    def _generators(self) -> dict[str, Any]:
        own = {str(i): generator.get_state() for i, generator in enumerate(self._own_generators())}
        return {"ambient": capture_rng(), "own": own, "seeds": self.seeds}

    def _draw_from(self, states: Mapping[str, Any]) -> None:
        restore_rng(states["ambient"])
        for i, generator in enumerate(self._own_generators()):
            if str(i) in states["own"]:
                generator.set_state(states["own"][str(i)])

    def _own_generators(self) -> list[torch.Generator]:
        found = [getattr(part, "generator", None) for part in parts_of(self.inner)]
        return [generator for generator in found if isinstance(generator, torch.Generator)]


def is_drawn_from(order: Mapping[str, Any]) -> bool:
    """Return whether this is what the order of an epoch can have been drawn from.

    The states of the global generators are looked at where they are restored.
    """
    own: Any = order.get("own")
    try:
        for state in own.values() if isinstance(own, dict) else (own,):
            torch.Generator().set_state(state)
    except (TypeError, RuntimeError):
        return False
    return "ambient" in order


def are_counts(numbers: object) -> bool:
    """Return whether these can be how many lists of each epoch were drawn."""
    return isinstance(numbers, list) and all(type(one) is int and one >= 0 for one in numbers)


def _counted(lists: Iterator[list[int]], digests: EpochDigests | None) -> Iterator[list[int]]:
    for indices in lists:
        if digests is not None:
            digests.add(str(indices))
        yield indices
    if digests is not None:
        digests.end()


_OPTIONS = (
    *("num_workers", "pin_memory", "timeout", "multiprocessing_context", "generator"),
    *("prefetch_factor", "persistent_workers", "in_order"),
)
_DRAW_NOTHING = (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
)


def keyed_loader(base: Any, *, seed: int, rank: int, world_size: int, ahead: int) -> Any:
    """Return the host's loader with the same batches in the same order, which can begin anywhere.

    What is random in samples and collators is keyed by (seed, epoch, sample): it depends neither
    on workers nor on what was read before. What draws nothing gives the very same batches.

    Args:
        base: What the host made of the data set, the sampler and the collator.
        seed: The seed of the data.
        rank: This rank.
        world_size: Number of ranks.
        ahead: How many batches the host reads before it uses them.

    Raises:
        ConfigError: The host has made a loader of another kind.
    """
    if not _is_plain(base):
        return _replayed(base, seed)
    dispatches = isinstance(base, DataLoaderDispatcher)
    is_stream = isinstance(base.dataset, IterableDataset)
    is_prepared = isinstance(base, DataLoaderShard | DataLoaderDispatcher)
    if dispatches and not (is_stream or world_size == 1):
        raise ConfigError(
            "accelerator_config",
            "its kind of data loader cannot be continued exactly",
            expected="each rank reads its own batches (dispatch_batches=False)",
            found=type(base).__name__,
        )
    options = {name: getattr(base, name) for name in _OPTIONS if hasattr(base, name)}
    leave = leaving_signals(base.worker_init_fn) if options["num_workers"] else None
    source: Any
    if is_stream:
        shared = dispatches and world_size > 1
        source = _keyed_iterable(base, seed, fills=shared, remembers=0 if shared else ahead + 2)
        options["batch_size"] = None
        if shared:
            return _dispatched(base, source, options, leave)
    else:
        source = Records(base.dataset, seed, _declared(base.collate_fn))
        inner, samples = base.batch_sampler, len(base.dataset)
        data = base.dataset if is_prepared else None
        options["batch_sampler"] = IndexBatches(
            inner, samples, rank=rank, world_size=world_size, data=data, sets_epochs=is_prepared
        )
    state = getattr(base, "state", None)
    return DataLoaderShard(
        source,
        device=getattr(base, "device", None) if state is None or not dispatches else state.device,
        rng_types=getattr(base, "rng_types", None),
        synchronized_generator=getattr(base, "synchronized_generator", None),
        _drop_last=getattr(base, "_drop_last", False),
        _non_blocking=getattr(base, "_non_blocking", False),
        collate_fn=_as_it_is,
        worker_init_fn=leave,
        **options,
    )


def is_of_host(base: Any, dataset: Any) -> bool:
    """Return whether the host may have made a loader, of this data set."""
    made = isinstance(base, DataLoaderShard | DataLoaderDispatcher)
    return made and _same_data(base.dataset, dataset)


def _same_data(one: Any, dataset: Any) -> bool:
    """Return whether data are this data set, or a part of it that the host or `datasets` makes."""
    inner = getattr(one, "dataset", one)  # of a rank's part of a stream
    return inner is dataset or (dataset is not None and type(inner) is type(dataset))


def batch_size_of(own_loader: Any) -> int | None:
    """Return how many samples a loader of the user's own has in a batch; None: it does not say."""
    sampler = getattr(own_loader, "batch_sampler", None)
    sizes = (getattr(own_loader, "batch_size", None), getattr(sampler, "batch_size", None))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _is_plain(base: Any) -> bool:
    """Return whether a loader is one of torch or accelerate that makes its batches as they do."""
    kinds = (DataLoader, DataLoaderShard, DataLoaderDispatcher)
    if not isinstance(base, DataLoader) or type(base).__iter__ not in [k.__iter__ for k in kinds]:
        return False
    if isinstance(base.dataset, IterableDataset):
        return base.batch_size is not None
    return base.batch_sampler is not None


def _replayed(base: Any, seed: int) -> DataLoaderShard:
    """Return a loader of the batches that any iterable gives, which is read again to its place."""
    epochs = KeyedIterable(base, seed, batch_size=1, collate_fn=_only, reads_epochs_before=True)
    plain = {"batch_size": None, "collate_fn": _as_it_is}
    own = torch.Generator()  # torch draws from it once an epoch; nothing does where there is a list
    return DataLoaderShard(epochs, device=None, generator=own, **plain)


@stored_name("unbroken.adapters.transformers.loading._only")
def _only(batches: list[Any]) -> Any:
    return batches[0]


def begin_at(loader: Any, beginning: Beginning) -> None:
    """Let a loader of `keyed_loader` begin in the middle of an epoch."""
    if isinstance(loader.dataset, KeyedIterable):
        at = (beginning.epoch, beginning.batches)
        loader.dataset.begin(*at, beginning.data, beginning.trail, beginning.saved_order)
    else:
        loader.batch_sampler.begin(beginning)


def data_state(loader: Any, epoch: int, batches: int) -> Any:
    """Return the state of an iterable data set at a position; None: it has no exact one."""
    data = loader.dataset
    return data.state_after(epoch, batches) if isinstance(data, KeyedIterable) else None


def trail_of(loader: Any, epoch: int, batches: int) -> dict[str, Any]:
    """Return the digests that the batches up to a position must match; {}: not known."""
    holder = loader.dataset if isinstance(loader.dataset, KeyedIterable) else loader.batch_sampler
    found: dict[str, Any] = holder.trail(epoch, batches)
    return found


def order_of(loader: Any) -> dict[str, Any]:
    """Return what the order of the epoch under way was drawn from."""
    holder = loader.dataset if isinstance(loader.dataset, KeyedIterable) else loader.batch_sampler
    found: dict[str, Any] = holder.order
    return found


def unknown_order(loader: Any, position: DataPosition) -> tuple[Difference, ...]:
    """Report an order that a Hugging Face checkpoint does not hold and that cannot be derived.

    Args:
        loader: One of `keyed_loader`.
        position: Where the checkpoint is. The order of the first epoch follows from the seed.
    """
    if not (position.epoch and position.batches) or isinstance(loader.dataset, KeyedIterable):
        return ()
    kind = loader.batch_sampler.drawn_by
    if kind is None:
        return ()
    effect = "some samples of this epoch come twice, others not at all, as in transformers' own"
    was = f"an order of epoch {position.epoch} that the checkpoint does not hold"
    return (Difference("data.order", was, f"drawn anew by {kind}", effect, "changed"),)


def batches_left(loader: Any, samples: int) -> int | None:
    """Return how many batches of an epoch are left after `samples`; None: not known."""
    if isinstance(loader.dataset, KeyedIterable):
        return None
    return loader.batch_sampler.left_after(samples)  # type: ignore[no-any-return]


def _dispatched(base: Any, source: KeyedIterable, options: dict[str, Any], leave: Any) -> Any:
    """Return a loader that reads on rank 0 for all ranks, as the host's does."""
    return DataLoaderDispatcher(
        source,
        split_batches=base.split_batches,
        _drop_last=base._drop_last,  # noqa: SLF001 (the host's own, handed on)
        _non_blocking=base._non_blocking,  # noqa: SLF001
        slice_fn=base.slice_fn,
        collate_fn=_as_it_is,
        worker_init_fn=leave,
        **options,
    )


def _keyed_iterable(base: Any, seed: int, *, fills: bool, remembers: int) -> KeyedIterable:
    return KeyedIterable(
        base.dataset,
        seed,
        batch_size=base.batch_size,
        collate_fn=base.collate_fn,
        drop_last=base.drop_last,
        fills=fills,
        remembers=remembers,
    )


@stored_name("unbroken.adapters.transformers.loading._as_it_is")
def _as_it_is(batch: Any) -> Any:
    return batch


@stored_name("unbroken.adapters.transformers.loading._DrawsNothing")
class _DrawsNothing:
    """A collator of the host that is known to draw no random numbers."""

    deterministic = True

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        return self._collate(samples)


def _declared(collate: Any) -> Any:
    """Return a collator, with a mark if it is known to draw no random numbers."""
    inner = collate
    while type(inner).__name__ == "RemoveColumnsCollator":
        inner = inner.data_collator
    plain = inner is default_data_collator or type(inner) in _DRAW_NOTHING
    if type(inner) is DataCollatorForLanguageModeling:
        plain = not inner.mlm
    return _DrawsNothing(collate) if plain else collate
