"""Map-style data sets: order, randomness and position are computed, nothing is replayed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from unbroken.data.keyed_rng import KeyedRandom, derive_key
from unbroken.data.order import BatchShape, GlobalOrder, MicroBatchSampler, SampleKey
from unbroken.data.sources.own_generators import OwnGenerators
from unbroken.data.sources.protocol import (
    MAY_CHANGE_WITH_DATA,
    MicroBatch,
    Position,
    RunningIterator,
    require_counts,
    require_same_facts,
)
from unbroken.data.worker_signals import leaving_signals, shut_down
from unbroken.errors import ConfigError, DataError
from unbroken.introspection import declared, has
from unbroken.stored_names import stored_name

# A map-style data set in which randomness depends on the sample alone.


_WITHOUT_RANDOMNESS = (list, tuple, range, np.ndarray, torch.Tensor, TensorDataset)


@stored_name("unbroken.data.keyed_dataset.KeyedDataset")
class KeyedDataset:
    """Whole batches of a data set; what is random in them depends on (seed, epoch, index).

    Each `dataset[index]` runs with Python's, NumPy's and torch's global generators keyed by
    (seed, epoch, index), the collator with them keyed by (seed, position of the batch's first
    sample). So neither workers nor prefetching nor earlier samples matter, and the ambient
    generators are left exactly as they were.

    A data set that declares `deterministic = True` draws nothing: it is not seeded, and its
    own `__getitems__` is used. Elsewhere `__getitems__` is not used, because then the draws of
    a sample would depend on its batch. Lists, tensors and arrays are known to be deterministic.
    A collator may declare the same.

    Args:
        dataset: The data set: `dataset[index]`.
        seed: The seed of the run.
        collate_fn: Makes a batch of a list of samples; torch's `default_collate` by default.

    Attributes:
        collator_draws: Whether the collator may draw random numbers.

    Example:
        >>> batches = KeyedDataset([10, 20, 30], seed=0)
        >>> batches.__getitems__([SampleKey(2, 0, 0), SampleKey(0, 0, 1)])
        tensor([30, 10])
    """

    def __init__(
        self, dataset: Any, seed: int, collate_fn: Callable[[list[Any]], Any] | None = None
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self._collate = default_collate if collate_fn is None else collate_fn
        self._deterministic = is_deterministic(dataset)
        self.collator_draws = collate_fn is not None and not is_deterministic(collate_fn)
        self._nothing_random = self._deterministic and not self.collator_draws

    def __getitems__(self, keys: Sequence[SampleKey]) -> Any:
        """Return the collated batch of the samples."""
        if self._nothing_random:
            return self._collated(self._plain(keys), keys)
        with KeyedRandom() as rng:
            samples = self._plain(keys) if self._deterministic else self._keyed(keys, rng)
            rng.seed(derive_key(self.seed, "collate", keys[0].position))
            return self._collated(samples, keys)

    def _collated(self, samples: list[Any], keys: Sequence[SampleKey]) -> Any:
        try:
            return self._collate(samples)
        except Exception as error:
            error.add_note(f"in the collator, for the samples {[int(key) for key in keys]}")
            raise

    def _plain(self, keys: Sequence[SampleKey]) -> list[Any]:
        if has(self.dataset, "__getitems__"):
            samples: list[Any] = self.dataset.__getitems__([int(key) for key in keys])
            return samples
        return [self._sample(key) for key in keys]

    def _keyed(self, keys: Sequence[SampleKey], rng: KeyedRandom) -> list[Any]:
        samples = []
        for key in keys:
            rng.seed(derive_key(self.seed, "sample", key.epoch, int(key)))
            samples.append(self._sample(key))
        return samples

    def _sample(self, key: SampleKey) -> Any:
        try:
            return self.dataset[int(key)]
        except Exception as error:
            error.add_note(
                f"in the data set's sample {int(key)} (epoch {key.epoch}, position {key.position})"
            )
            raise


def is_deterministic(dataset: object) -> bool:
    """Return whether `dataset[index]` is known to draw no random numbers.

    Args:
        dataset: A map-style data set; a `Subset` is as its data set is.

    Returns:
        The data set's own `deterministic` attribute; else True for plain containers.

    Example:
        >>> is_deterministic([1, 2, 3])
        True
    """
    declared_value = declared(dataset, "deterministic")
    if declared_value is not None:
        return bool(declared_value)
    if type(dataset) is Subset:
        return is_deterministic(dataset.dataset)
    return type(dataset) in _WITHOUT_RANDOMNESS


@dataclass(frozen=True)
class Loading:
    """How batches are read; it never changes what is read.

    Attributes:
        num_workers: Processes that read; 0 reads in the process of the trainer.
        pin_memory: Copy batches into page-locked memory, where there is an accelerator.
        prefetch_factor: Batches that each worker reads ahead; torch's default is 2.
        multiprocessing_context: How workers start: "fork", "spawn" or "forkserver".
    """

    num_workers: int = 0
    pin_memory: bool = False
    prefetch_factor: int | None = None
    multiprocessing_context: Any = None

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ConfigError("num_workers", expected="at least 0", found=self.num_workers)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of torch's `DataLoader`, without those that mean nothing here."""
        pin_memory = self.pin_memory and torch.accelerator.is_available()
        if self.num_workers == 0:
            return {"pin_memory": pin_memory}
        return {
            "num_workers": self.num_workers,
            "pin_memory": pin_memory,
            "prefetch_factor": self.prefetch_factor,
            "multiprocessing_context": self.multiprocessing_context,
            "worker_init_fn": leaving_signals(),
        }


@stored_name("unbroken.data.map_source.MapSource")
class MapSource:
    """Batches of a map-style data set: seeks in O(1), and its state is one integer.

    What is random in a sample is keyed by (seed, epoch, index): see `KeyedDataset`. So the
    same batches come at any world size, with any number of workers, from any position.
    A plain torch `DataLoader` does the reading.

    Args:
        dataset: Has `__getitem__` and `__len__`. Where it has a string `fingerprint`, the
            fingerprint becomes part of the state, so that changed data are noticed.
        order: The order of its samples.
        shape: How a global batch is cut.
        collate_fn: Makes a batch of a list of samples; torch's `default_collate` by default.
        loading: How batches are read.
        may_change: Facts (see `state_dict`) that need not be those of a loaded state. Steps of
            another size are counted from the loaded position on, which stays in samples.

    Attributes:
        data: The data set.
        collate_fn: As it was given.
        own_generators: Those that the data set and the collator hold.

    Example:
        >>> order = GlobalOrder(6, seed=0, shuffle=False)
        >>> source = MapSource(list("abcdef"), order, BatchShape(4, 2))
        >>> batches = source.iterate(Position(samples=4))
        >>> next(batches).data, next(batches).data
        (['e', 'f'], ['a', 'b'])
    """

    kind: ClassVar[str] = "map"

    def __init__(
        self,
        dataset: Any,
        order: GlobalOrder,
        shape: BatchShape,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        loading: Loading | None = None,
        may_change: Collection[str] = (),
    ) -> None:
        self.data, self.collate_fn = dataset, collate_fn
        self.order = order
        self.shape = shape
        self.position = Position()
        self._steps_from = 0  # the position that steps of this size are counted from
        self._may_change = frozenset(may_change)
        self._batches = KeyedDataset(dataset, order.seed, collate_fn)
        self._fingerprint = declared(dataset, "fingerprint")
        self._loading = Loading() if loading is None else loading
        self.running = RunningIterator()
        self.on_workers: Callable[[], object] = lambda: None
        self.own_generators = OwnGenerators(
            {"data": dataset, "collate_fn": collate_fn},
            is_alone=self._loading.num_workers == 0 and shape.world_size == 1,
        )

    @property
    def draws_by_sample(self) -> bool:
        """Whether nothing is drawn for a whole batch, however it is cut."""
        return not self._batches.collator_draws

    def next_samples(self, most: int) -> list[int]:
        """Return the indices of the samples that come next, of all ranks, in their order.

        Args:
            most: How many at most; at most those of a global batch.
        """
        start, count = self.position.samples, min(most, self.shape.global_batch_size)
        return [int(one) for one in self.order.samples(start, start + count)]

    @property
    def steps_per_epoch(self) -> Fraction:
        """Optimizer steps in one epoch, exactly; not whole where a batch may span two epochs."""
        return Fraction(self.order.epoch_size, self.shape.global_batch_size)

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one epoch."""
        return self.order.epoch_size

    def split_into(self, micro_batch_size: int) -> None:
        """Cut global batches into micro-batches of another size; only at the edge of a step.

        Raises:
            ConfigError: The global batch cannot be cut so.
        """
        self.running.close()
        self.shape = replace(self.shape, micro_batch_size=micro_batch_size)

    def iterate(self, position: Position | None = None) -> Iterator[MicroBatch]:
        """Return the micro-batches from a position on, endless; the first one comes in O(1).

        Raises:
            ConfigError: The position lies in the middle of a step that cannot be finished with
                these sizes.
        """
        start = self.position if position is None else position
        return self.running.begin(self._read(self._sampler(start), start))

    def _sampler(self, start: Position, stop: int | None = None) -> MicroBatchSampler:
        shape = self.shape
        return MicroBatchSampler(
            self.order,
            shape.global_batch_size,
            shape.micro_batch_size,
            shape.rank,
            shape.world_size,
            start.samples,
            steps_from=self._steps_from,
            stop=stop,
        )

    @property
    def epoch(self) -> int:
        """The epoch that the position lies in; at the edge of two, the next one."""
        return self.order.epoch(self.position.samples)

    def rest_of_epoch(self, epoch: int) -> Iterator[MicroBatch]:
        """Return the micro-batches of this epoch that are still to come.

        Raises:
            DataError: An epoch is no whole number of batches.
        """
        size, stop = self.order.epoch_size, (epoch + 1) * self.order.epoch_size
        if (stop - self._steps_from) % self.shape.global_batch_size:
            raise DataError(
                "data",
                "a batch would span two epochs",
                expected=f"epochs of a multiple of {self.shape.global_batch_size} samples",
                found=f"{size} samples",
                hint="give batch_source drop_last, which leaves out samples that fill no batch, "
                "others in each epoch",
            )
        if self.position.samples >= stop:
            return iter(())
        sampler = self._sampler(self.position, stop)
        return self.running.begin(self._read(sampler, self.position))

    def end_epoch(self, epoch: int) -> None:
        """Go to the beginning of the next epoch, whatever of this one was left out."""
        stop = (epoch + 1) * self.order.epoch_size
        if self.position.samples == stop:
            return
        self.running.close()
        self.position = Position(stop)
        self.own_generators.note(self.position)

    def used(self, micro: MicroBatch) -> None:
        """Record that a micro-batch was used."""
        self.position = micro.after

    def micro_batches_left(self) -> int:
        """Return how many micro-batches are left in the current optimizer step: 1 to A."""
        return self.shape.micro_batches_left(self.position.samples - self._steps_from)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of samples used, and what the order depends on."""
        position = {"samples": self.position.samples, "steps_from": self._steps_from}
        drawn = self.own_generators.state(self.position)
        own = {} if drawn is None else {"generators": drawn}
        return {**self._facts(), **position, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; it may have been saved at another world size.

        Raises:
            DataError: The order of the data would not be that of the saved run.
        """
        self.check_state_dict(state)
        self.running.close()
        self.position = Position(samples=state["samples"])
        self._steps_from = state.get("steps_from", 0)
        if state["global_batch_size"] != self.shape.global_batch_size:
            self._steps_from = self.position.samples  # from here on they are of another size
        self.own_generators.restore(state.get("generators"))

    def accept_other_data(self) -> None:
        """Accept a position even if the data now give other batches up to it."""
        self._may_change |= MAY_CHANGE_WITH_DATA

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise what `load_state_dict` would raise, and change nothing."""
        require_same_facts(state, self._facts(), self._may_change)
        require_counts({"steps_from": 0, **state}, "samples", "steps_from", "global_batch_size")
        if not self._may_change >= MAY_CHANGE_WITH_DATA:
            self.own_generators.check(state.get("generators"))
        size, now = state["global_batch_size"], self.shape.global_batch_size
        if size != now and size and (state["samples"] - state.get("steps_from", 0)) % size:
            raise DataError(
                "data.global_batch_size",
                "cannot be changed in the middle of a step",
                expected=size,
                found=now,
                hint="Resume from a checkpoint between two steps.",
            )

    def close(self) -> None:
        """Stop reading and shut the workers down; the position stays."""
        self.running.close()

    def _read(
        self, sampler: MicroBatchSampler, start: Position
    ) -> Generator[MicroBatch, None, None]:
        loader: DataLoader[Any] = DataLoader(
            self._batches,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else iter() would draw from the global generator
            **self._loading.arguments(),
        )
        if self._loading.num_workers:
            self.on_workers()
        size, used = self.shape.micro_batch_size, sampler.start
        self.own_generators.begin(start)
        batches = iter(loader)
        try:
            for first, data in zip(sampler.first_positions(), batches, strict=False):
                used += self.shape.stride
                after = Position(used)
                self.own_generators.note(after)
                yield MicroBatch(data, size, self.order.epoch(first), first, after)
        finally:
            shut_down(batches)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "kind": self.kind,
            "n": self.order.n,
            "seed": self.order.seed,
            "order": self.order.version,
            "shuffle": self.order.shuffle,
            "epoch_size": self.order.epoch_size,
            "global_batch_size": self.shape.global_batch_size,
        }
        if isinstance(self._fingerprint, str):
            facts["fingerprint"] = self._fingerprint
        return facts


def _as_it_is(batch: Any) -> Any:
    """The batches are collated where the samples are drawn, under one key."""
    return batch
