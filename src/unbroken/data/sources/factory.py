"""From whatever holds the user's data to a source of batches.

- A map-style data set (`__getitem__` and `__len__`; a list is one) gives a `MapSource`: order and
  randomness are computed, it continues at once, at any world size.
- A loader, or an iterable data set, with `state_dict` and `load_state_dict` gives a
  `StatefulSource`: it continues through its own state, unless that is known not to be exact
  (`reason_to_replay`).
- Any other iterable that can be iterated again, or a function that returns a new iterator, gives
  a `CountedSource`: to continue, its epoch is read again up to the position.

A torch or Hugging Face iterable data set gives single samples, dealt to the ranks here; every
other iterable gives whole micro-batches, and with several ranks each rank's own.

    >>> source = batch_source(range(10), seed=42, global_batch_size=4, micro_batch_size=2)
    >>> for micro in source.iterate():
    ...     source.used(micro)
    ...     if source.position.samples == 4:
    ...         break
    >>> source.state_dict()["samples"]
    4
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, default_collate

from unbroken.data.order import BatchShape, GlobalOrder
from unbroken.data.sources.iterable import Grouping, reason_to_replay
from unbroken.data.sources.loader import CountedSource, LoaderSource, OnSkip, StatefulSource
from unbroken.data.sources.map_style import Loading, MapSource
from unbroken.data.sources.protocol import BatchSource
from unbroken.errors import ConfigError, DataError
from unbroken.introspection import has


def batch_source(
    dataset_or_loader: Any,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    shuffle: bool = True,
    drop_last: bool = False,
    epoch_size: int | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    prefetch_factor: int | None = None,
    multiprocessing_context: Any = None,
    rank: int = 0,
    world_size: int = 1,
    on_skip: OnSkip | None = None,
    may_change: Collection[str] = (),
) -> BatchSource:
    """Return batches that continue exactly at any position, for whatever holds the data.

    Args:
        dataset_or_loader: A map-style data set, a loader, any iterable, or a function giving one.
        seed: The seed of the run; all order and randomness of the data derives from it.
        global_batch_size: Samples in one optimizer step, over all ranks.
        micro_batch_size: Samples in one forward pass on one rank; None: the rank's whole share.
        shuffle: Whether a map-style data set is shuffled, in each epoch anew.
        drop_last: Leave out the samples of an epoch that do not fill a global batch; else a
            batch may span two epochs. Nothing is ever padded.
        epoch_size: Use only so many samples of each epoch's order of a map-style data set.
        collate_fn: Makes a batch of a list of samples; torch's `default_collate` by default.
        num_workers: Processes that read a map-style data set.
        pin_memory: Copy its batches into page-locked memory.
        prefetch_factor: Batches that each worker reads ahead.
        multiprocessing_context: How workers start: "fork", "spawn" or "forkserver".
        rank: This rank.
        world_size: Number of ranks.
        on_skip: Told how a `CountedSource` gets on with skipping: (done, total, seconds).
        may_change: As `MapSource` takes it.

    Raises:
        DataError: The data cannot be read again from a position, or are too few.
        ConfigError: Sizes do not fit each other, or an option has no meaning for these data.
    """
    data, whole = dataset_or_loader, global_batch_size // max(1, world_size)
    micro = whole if micro_batch_size is None else micro_batch_size
    shape = BatchShape(global_batch_size, micro, rank, world_size)
    loading = Loading(num_workers, pin_memory, prefetch_factor, multiprocessing_context)
    _refuse_what_is_no_data(data)
    if _is_map_style(data):
        size = _epoch_size(len(data), epoch_size, shape, drop_last)
        order = GlobalOrder(len(data), seed, epoch_size=size, shuffle=shuffle)
        return MapSource(
            data, order, shape, collate_fn=collate_fn, loading=loading, may_change=may_change
        )
    grouping = Grouping(_gives_samples(data), collate_fn or default_collate, drop_last)
    _refuse_options_without_meaning(grouping, epoch_size, collate_fn, num_workers)
    return _loader_source(data, seed, shape, grouping, on_skip, may_change)


def loop_source(
    data: Any,
    *,
    seed: int,
    batch_size: int | None,
    whole_epochs: bool,
    rank: int = 0,
    world_size: int = 1,
) -> BatchSource:
    """Return the source of a hand-written loop: each micro-batch is one of the loop's batches.

    What a loader gives is a batch. So is what an iterable gives, unless it is a data set of single
    samples and `batch_size` says how many make a batch.

    Args:
        data: As `batch_source` takes it.
        seed: As `batch_source` takes it.
        batch_size: Samples in a batch of this rank; None: the data give batches.
        whole_epochs: Whether an epoch is a whole number of batches: what fills none is left out of
            a map-style data set's.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        DataError: The data cannot be read again from a position, or are too few.
        ConfigError: `batch_size` is missing, or has no meaning for these data.

    Example:
        >>> next(loop_source([[1, 2]], seed=0, batch_size=1, whole_epochs=False).iterate()).samples
        1
    """
    gives_samples = _is_map_style(data) or (_gives_samples(data) and batch_size is not None)
    kind = type(data).__name__
    if gives_samples and batch_size is None:
        hint = "run.steps(..., batch_size=...); or give a DataLoader, which has one"
        raise ConfigError("batch_size", f"is needed to make batches of a {kind}", hint=hint)
    if not gives_samples and batch_size is not None:
        what = f"has no meaning for a {kind}, which gives batches"
        raise ConfigError("batch_size", what, found=batch_size, hint="leave it out")
    size = 1 if batch_size is None else batch_size
    if gives_samples:
        return batch_source(
            data,
            seed=seed,
            global_batch_size=size * world_size,
            micro_batch_size=size,
            drop_last=whole_epochs and _is_map_style(data),
            rank=rank,
            world_size=world_size,
        )
    _refuse_what_is_no_data(data)
    shape = BatchShape(world_size, 1, rank, world_size)
    return _loader_source(data, seed, shape, Grouping(), None, ())


def _loader_source(
    data: Any,
    seed: int,
    shape: BatchShape,
    grouping: Grouping,
    on_skip: OnSkip | None,
    may_change: Collection[str],
) -> LoaderSource:
    reason = reason_to_replay(data)
    if reason is None:
        return StatefulSource(
            data, seed=seed, shape=shape, grouping=grouping, may_change=may_change
        )
    return CountedSource(
        data,
        seed=seed,
        shape=shape,
        grouping=grouping,
        reason=reason,
        on_skip=on_skip,
        may_change=may_change,
    )


def _epoch_size(n: int, requested: int | None, shape: BatchShape, drop_last: bool) -> int:
    """Return how many samples of an epoch are used."""
    if n < 1:
        raise DataError("data set", "it is empty", expected="at least 1 sample", found=n)
    size = n if requested is None else requested
    if not 1 <= size <= n:
        raise ConfigError("epoch_size", expected=f"1 to {n}, the samples there are", found=size)
    if size < shape.global_batch_size:
        raise DataError(
            "data set",
            "an epoch is smaller than a global batch",
            expected=f"at least {shape.global_batch_size} samples",
            found=size,
            hint="Give more data, or a smaller global_batch_size.",
        )
    return size - size % shape.global_batch_size if drop_last else size


def _is_map_style(data: Any) -> bool:
    if isinstance(data, (IterableDataset, DataLoader)):
        return False
    return has(data, "__getitem__") and has(data, "__len__")


def _gives_samples(data: Any) -> bool:
    """Return whether the data give single samples, as iterable data sets do."""
    return isinstance(data, IterableDataset) or type(data).__name__ == "IterableDataset"


def _refuse_what_is_no_data(data: Any) -> None:
    if isinstance(data, (str, bytes)):
        raise DataError(
            "data set",
            "a string is no data set",
            found=repr(data[:80]),
            hint="For text files: unbroken.language_model.TokenDataset.from_files(...).",
        )
    if isinstance(data, Mapping):
        raise DataError(
            "data set",
            "a mapping is no data set",
            found=f"keys {list(data)[:8]}",
            hint='Give one of its values, such as data["train"].',
        )


def _refuse_options_without_meaning(
    grouping: Grouping, epoch_size: int | None, collate_fn: object, num_workers: int
) -> None:
    given = {"epoch_size": epoch_size is not None, "num_workers": num_workers > 0}
    if not grouping.samples:
        given["collate_fn"] = collate_fn is not None
    for name, is_given in given.items():
        if is_given:
            raise ConfigError(
                name,
                "has no meaning for a loader or an iterable, which decides this itself",
                hint="Leave it out, or give a map-style data set.",
            )
