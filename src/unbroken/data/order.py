"""The global order: one endless stream of samples, computed from (seed, position)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from unbroken.data.keys import derive_key
from unbroken.data.permutation import Permutation
from unbroken.errors import ConfigError, DataError

_BLOCK = 4096  # positions computed at once: about 0.1 microseconds each


class SampleKey(int):
    """The index of a sample in its data set, which also knows where in the stream it stands.

    It is an `int`, so every data set takes it as an index.

    Attributes:
        epoch: The epoch that the sample is drawn in, from 0.
        position: Its position in the global stream, from 0.

    Example:
        >>> key = SampleKey(17, epoch=2, position=2005)
        >>> key, key.epoch, list(range(100, 200))[key]
        (17, 2, 117)
    """

    epoch: int
    position: int

    def __new__(cls, index: int, epoch: int, position: int) -> SampleKey:
        """Return the key of `index` at `position` in `epoch`."""
        key = super().__new__(cls, index)
        key.epoch = epoch
        key.position = position
        return key

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleKey, (int(self), self.epoch, self.position)


class GlobalOrder:
    """The sample at each global position 0, 1, 2, ...: endless, O(1) memory and O(1) seek.

    Epoch e covers the positions [e * epoch_size, (e + 1) * epoch_size), in the order of a
    permutation of [0, n) keyed by (seed, e). Within an epoch no sample comes twice; with
    epoch_size == n every sample comes exactly once.

    Args:
        n: Number of samples in the data set.
        seed: Any integer.
        epoch_size: How many samples of each epoch's permutation are used; all n by default.
        shuffle: False gives the order of the data set in every epoch.

    Raises:
        DataError: The data set is empty.
        ConfigError: epoch_size is not in [1, n].

    Example:
        >>> order = GlobalOrder(5, seed=42)
        >>> sorted(order.samples(5, 10).tolist()), order.epoch(7)
        ([0, 1, 2, 3, 4], 1)
        >>> GlobalOrder(3, seed=42, shuffle=False).samples(1, 7).tolist()
        [1, 2, 0, 1, 2, 0]
    """

    version: ClassVar[str] = Permutation.version

    def __init__(
        self, n: int, seed: int, *, epoch_size: int | None = None, shuffle: bool = True
    ) -> None:
        if n < 1:
            raise DataError("data set", "it is empty", expected="at least 1 sample", found=n)
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self.epoch_size = n if epoch_size is None else epoch_size
        if not 1 <= self.epoch_size <= n:
            raise ConfigError(
                "epoch_size", expected=f"1 to {n}, the samples there are", found=epoch_size
            )
        self._cached: tuple[int, NDArray[np.int64]] = (0, np.empty(0, dtype=np.int64))

    def epoch(self, position: int) -> int:
        """Return the epoch that a global position lies in, from 0."""
        return position // self.epoch_size

    def offset(self, position: int) -> int:
        """Return the place of a global position within its epoch, from 0."""
        return position % self.epoch_size

    def samples(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the data set's indices at the global positions [start, stop).

        Args:
            start: First global position, >= 0.
            stop: One past the last global position.

        Returns:
            int64 array of shape (stop - start,).

        Raises:
            ConfigError: Not 0 <= start <= stop.
        """
        if not 0 <= start <= stop:
            raise ConfigError("positions", expected="0 <= start <= stop", found=(start, stop))
        indices = np.empty(stop - start, dtype=np.int64)
        done = 0
        while done < indices.size:
            part = self._from_block(start + done)[: indices.size - done]
            indices[done : done + part.size] = part
            done += part.size
        return indices

    def keys(self, start: int, stop: int) -> list[SampleKey]:
        """Return the samples at the global positions [start, stop), each with its place."""
        return [
            SampleKey(index, self.epoch(position), position)
            for position, index in enumerate(self.samples(start, stop).tolist(), start)
        ]

    def _from_block(self, position: int) -> NDArray[np.int64]:
        """The indices from a position to the end of its block."""
        first, block = self._cached
        if not first <= position < first + block.size:
            epoch, offset = divmod(position, self.epoch_size)
            begin = offset - offset % _BLOCK
            block = self._block(epoch, begin, min(begin + _BLOCK, self.epoch_size))
            first = epoch * self.epoch_size + begin
            self._cached = (first, block)
        return block[position - first :]

    def _block(self, epoch: int, begin: int, end: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(begin, end, dtype=np.int64)
        permutation = Permutation(self.n, derive_key(self.seed, "order", epoch))
        return permutation(np.arange(begin, end, dtype=np.uint64)).astype(np.int64)
