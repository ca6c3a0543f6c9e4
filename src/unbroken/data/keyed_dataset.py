"""A map-style data set in which randomness depends on the sample alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from unbroken.data.introspection import declared, has
from unbroken.data.keyed_rng import KeyedRandom, derive_key
from unbroken.data.order.global_order import SampleKey
from unbroken.stored_names import stored_name

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
        draws = collate_fn is not None and not is_deterministic(collate_fn)
        self._nothing_random = self._deterministic and not draws

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
    said = declared(dataset, "deterministic")
    if said is not None:
        return bool(said)
    if type(dataset) is Subset:
        return is_deterministic(dataset.dataset)
    return type(dataset) in _WITHOUT_RANDOMNESS
