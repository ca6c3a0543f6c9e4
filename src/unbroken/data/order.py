"""Which samples make which batch: a pure function of seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from unbroken.data.keyed_rng import derive_key
from unbroken.errors import ConfigError, DataError
from unbroken.stored_names import stored_name

# A keyed permutation of [0, n) that needs no memory: any element, at once, for any n.


Uint64Array = NDArray[np.uint64]

_ROUNDS = 12  # 8 leave the orders of n = 4 uneven by 1.6 %, 12 by 0.1 %; larger n need fewer
_LARGEST = 1 << 62

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@stored_name("unbroken.data.permutation.Permutation")
class Permutation:
    """A bijection of [0, n), chosen by a 64-bit key; O(1) memory, any position at once.

    A generalised Feistel network on the smallest power of two >= n, in which two halves are
    added to in turn, with cycle walking back into [0, n) (J. Black and P. Rogaway, *Ciphers
    with Arbitrary Finite Domains*, CT-RSA 2002). The round function and the key schedule are
    splitmix64 (G. Steele, D. Lea, C. Flood, OOPSLA 2014). It shuffles; it does not encrypt.
    Arithmetic is uint64 alone, so that every platform gives the same order.

    Args:
        n: Number of elements, 1 <= n <= 2**62.
        key: The key, 0 <= key < 2**64, see `derive_key`.

    Raises:
        ConfigError: n or key is outside its range.

    Attributes:
        version: Name of the function; it stands in the saved state. A change of any output
            would be a new version.

    Example:
        >>> Permutation(10, key=1)(np.arange(10, dtype=np.uint64)).tolist()
        [8, 6, 5, 0, 4, 2, 9, 1, 7, 3]
    """

    version: ClassVar[str] = "feistel-1"

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= _LARGEST:
            raise ConfigError("Permutation.n", expected="1 <= n <= 2**62", found=n)
        if not 0 <= key < 1 << 64:
            raise ConfigError("Permutation.key", expected="0 <= key < 2**64", found=key)
        bits = max(2, (n - 1).bit_length())
        self.n = n
        self.key = key
        self._n = np.uint64(n)
        self._low_bits = bits // 2
        self._high_bits = bits - bits // 2
        counters = np.arange(1, _ROUNDS + 1, dtype=np.uint64)
        self._round_keys = _mix(np.uint64(key) + counters * _GOLDEN)

    def __call__(self, positions: Uint64Array) -> Uint64Array:
        """Return the element at each position.

        Args:
            positions: uint64 array of any shape, each in [0, n).

        Returns:
            A uint64 array of the same shape, each in [0, n).

        Raises:
            ConfigError: A position is not in [0, n).
        """
        values = np.asarray(positions, dtype=np.uint64).reshape(-1)
        if values.size and values.max() >= self._n:
            raise ConfigError("positions", expected=f"all < {self.n}", found=values.max())
        values = self._network(values)
        outside = np.flatnonzero(values >= self._n)
        while outside.size:  # at most half of the network's domain is outside, so this is short
            values[outside] = self._network(values[outside])
            outside = outside[values[outside] >= self._n]
        return values.reshape(np.shape(positions))

    def _network(self, values: Uint64Array) -> Uint64Array:
        """Permute [0, 2**bits): each round adds a function of one half to the other."""
        low_bits = np.uint64(self._low_bits)
        low_mask = np.uint64((1 << self._low_bits) - 1)
        high_mask = np.uint64((1 << self._high_bits) - 1)
        low_shift, high_shift = np.uint64(64 - self._low_bits), np.uint64(64 - self._high_bits)
        high, low = values >> low_bits, values & low_mask
        for even_key, odd_key in self._round_keys.reshape(-1, 2):
            high = (high + (_mix(low + even_key) >> high_shift)) & high_mask
            low = (low + (_mix(high + odd_key) >> low_shift)) & low_mask
        return (high << low_bits) | low


def _mix(z: Uint64Array) -> Uint64Array:
    """The output function of splitmix64, a bijection of 64 bits."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


_BLOCK = 4096  # positions computed at once: about 0.1 microseconds each


@stored_name("unbroken.data.order.SampleKey")
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


@stored_name("unbroken.data.order.GlobalOrder")
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
        """Return where in its epoch a global position lies, from 0."""
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
        """Return the samples at the global positions [start, stop), each with its position."""
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


# How the global stream is cut into optimizer steps, micro-batches and ranks.


@dataclass(frozen=True)
class BatchShape:
    """How one global batch is cut: A micro-batches of m samples on each of W ranks.

    Args:
        global_batch_size: G, samples in one optimizer step, over all ranks.
        micro_batch_size: m, samples in one forward pass on one rank.
        rank: This rank, 0 <= rank < world_size.
        world_size: W, number of ranks.

    Raises:
        ConfigError: A size is not positive, or G is not divisible by m * W.

    Example:
        >>> BatchShape(32, 4, rank=0, world_size=2).accumulation
        4
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ConfigError(name, expected="at least 1", found=getattr(self, name))
        if not 0 <= self.rank < self.world_size:
            raise ConfigError("rank", expected=f"0 to {self.world_size - 1}", found=self.rank)
        if self.global_batch_size % self.stride:
            raise ConfigError(
                "global_batch_size",
                "must be divisible by micro_batch_size * world_size",
                expected=f"a multiple of {self.micro_batch_size} * {self.world_size}",
                found=self.global_batch_size,
            )

    @property
    def stride(self) -> int:
        """Samples in one micro-batch of all ranks together: m * W."""
        return self.micro_batch_size * self.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each rank: A = G / (m * W)."""
        return self.global_batch_size // self.stride

    def micro_batches_left(self, position: int) -> int:
        """Return how many micro-batches a rank still has to use in the step at a position.

        Args:
            position: Samples used by all ranks; it may lie in the middle of a step.

        Returns:
            1 to A; at the edge of a step, A.

        Raises:
            ConfigError: The samples left in the step cannot be cut into whole micro-batches.
        """
        left = self.global_batch_size - position % self.global_batch_size
        if left % self.stride:
            raise ConfigError(
                "micro_batch_size",
                f"position {position} lies in the middle of an optimizer step whose "
                f"{left} samples left must be cut into whole micro-batches of all ranks",
                expected=f"a divisor of {left}",
                found=f"{self.micro_batch_size} * {self.world_size} ranks",
                hint="Use the sizes of the run that saved this position, for this step at least.",
            )
        return left // self.stride


@stored_name("unbroken.data.sampler.MicroBatchSampler")
class MicroBatchSampler:
    """The samples of one rank, micro-batch by micro-batch, from any position on, endless.

    Optimizer step s takes the global positions [s*G, (s+1)*G) of the order; rank r takes the r-th
    of W equal parts of them, and its micro-batch a the a-th m samples of that part. So world
    size, accumulation and workers only cut the stream; they never change which samples a step
    uses, nor their order; and the micro-batches of all ranks are those of one.

    It is a `batch_sampler` for a plain `torch.utils.data.DataLoader`; give that loader its own
    `generator=` as well, because `iter(DataLoader)` else draws from torch's global generator.

    Args:
        order: The global order.
        global_batch_size: G, samples in one optimizer step, over all ranks.
        micro_batch_size: m, samples in one forward pass on one rank.
        rank: This rank.
        world_size: W, number of ranks.
        start: Samples used so far by all ranks; it may lie in the middle of a step.
        steps_from: The position that steps of this size are counted from.
        stop: The position, between two steps, where it ends; None: it is endless.

    Raises:
        ConfigError: The sizes do not fit each other, or not the start position.

    Example:
        >>> order = GlobalOrder(8, seed=0, shuffle=False)
        >>> sampler = MicroBatchSampler(order, 4, 1, rank=1, world_size=2, start=4)
        >>> batches = iter(sampler)
        >>> next(batches), next(batches), next(batches)
        ([6], [7], [2])
    """

    def __init__(
        self,
        order: GlobalOrder,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        *,
        steps_from: int = 0,
        stop: int | None = None,
    ) -> None:
        if start < 0:
            raise ConfigError("start", expected="a position >= 0", found=start)
        self.order = order
        self.shape = BatchShape(global_batch_size, micro_batch_size, rank, world_size)
        self.start = start
        self.shape.micro_batches_left(start - steps_from)
        self._steps_from, self._stop = steps_from, stop

    def first_positions(self) -> Iterator[int]:
        """Yield the position of the first sample of each micro-batch of this rank."""
        shape, begin = self.shape, self.start
        left = shape.micro_batches_left(self.start - self._steps_from)
        while self._stop is None or begin < self._stop:
            for micro in range(left):  # of a step that is pending only the rest is dealt out
                yield begin + (shape.rank * left + micro) * shape.micro_batch_size
            begin += left * shape.stride
            left = shape.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        size = self.shape.micro_batch_size
        for first in self.first_positions():
            yield self.order.keys(first, first + size)
