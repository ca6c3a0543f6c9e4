"""A keyed permutation of [0, n) that needs no memory: any element, at once, for any n."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from unbroken.errors import ConfigError
from unbroken.stored_names import stored_name

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
