"""The host's training loader rebuilt around batches that continue exactly at any place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DefaultDataCollator,
    default_data_collator,
)

from unbroken.adapters.transformers.batches import Beginning, IndexBatches, Records
from unbroken.adapters.transformers.passes import KeyedPasses
from unbroken.adapters.transformers.place import Place
from unbroken.checkpoint import Difference
from unbroken.data.workers import leaving_signals
from unbroken.errors import ConfigError

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
        source = _passes(base, seed, fills=shared, remembers=0 if shared else ahead + 2)
        options["batch_size"] = None
        if shared:
            return _dispatched(base, source, options, leave)
    else:
        source = Records(base.dataset, seed, _declared(base.collate_fn))
        inner, samples = base.batch_sampler, len(base.dataset)
        told = base.dataset if is_prepared else None
        options["batch_sampler"] = IndexBatches(
            inner, samples, rank=rank, world_size=world_size, data=told, tells_epochs=is_prepared
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
    passes = KeyedPasses(base, seed, batch_size=1, collate_fn=_only, reads_epochs_before=True)
    plain = {"batch_size": None, "collate_fn": _as_it_is}
    own = torch.Generator()  # torch draws from it once an epoch; nothing does where there is a list
    return DataLoaderShard(passes, device=None, generator=own, **plain)


def _only(batches: list[Any]) -> Any:
    return batches[0]


def begin_at(loader: Any, beginning: Beginning) -> None:
    """Let a loader of `keyed_loader` begin in the middle of an epoch."""
    if isinstance(loader.dataset, KeyedPasses):
        at = (beginning.epoch, beginning.batches)
        loader.dataset.begin(*at, beginning.data, beginning.trail)
    else:
        loader.batch_sampler.beginning = beginning
        loader.batch_sampler.seeds = beginning.seeds


def data_state(loader: Any, epoch: int, batches: int) -> Any:
    """Return the state of an iterable data set at a place; None: it has none that is exact."""
    passes = loader.dataset
    return passes.state_after(epoch, batches) if isinstance(passes, KeyedPasses) else None


def trail_of(loader: Any, epoch: int, batches: int) -> dict[str, Any]:
    """Return what the batches up to a place are to be held against; {}: nobody knows."""
    holder = loader.dataset if isinstance(loader.dataset, KeyedPasses) else loader.batch_sampler
    found: dict[str, Any] = holder.trail(epoch, batches)
    return found


def order_of(loader: Any) -> dict[str, Any]:
    """Return what the order of the epoch under way was drawn from."""
    return {} if isinstance(loader.dataset, KeyedPasses) else loader.batch_sampler.drawn_from


def unknown_order(loader: Any, place: Place) -> tuple[Difference, ...]:
    """Tell of an order that a stock checkpoint does not hold, and nothing else tells.

    Args:
        loader: One of `keyed_loader`.
        place: Where the checkpoint is. The order of the first epoch follows from the seed.
    """
    if not (place.epoch and place.batches) or isinstance(loader.dataset, KeyedPasses):
        return ()
    kind = loader.batch_sampler.drawn_by
    if kind is None:
        return ()
    effect = "some samples of this epoch come twice, others not at all, as in transformers' own"
    was = f"an order of epoch {place.epoch} that the checkpoint does not hold"
    return (Difference("data.order", was, f"drawn anew by {kind}", effect, "changed"),)


def batches_left(loader: Any, samples: int) -> int | None:
    """Return how many batches are left of an epoch after so many samples; None: nobody knows."""
    if isinstance(loader.dataset, KeyedPasses):
        return None
    return loader.batch_sampler.left_after(samples)  # type: ignore[no-any-return]


def _dispatched(base: Any, source: KeyedPasses, options: dict[str, Any], leave: Any) -> Any:
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


def _passes(base: Any, seed: int, *, fills: bool, remembers: int) -> KeyedPasses:
    return KeyedPasses(
        base.dataset,
        seed,
        batch_size=base.batch_size,
        collate_fn=base.collate_fn,
        drop_last=base.drop_last,
        fills=fills,
        remembers=remembers,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


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
