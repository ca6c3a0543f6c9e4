"""The permutation "feistel-1" written again in Python integers, and its inverse."""

from __future__ import annotations

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


class Reference:
    def __init__(self, n: int, key: int) -> None:
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self.low, self.high = bits // 2, (bits + 1) // 2
        self.keys = [mix(key + i * 0x9E3779B97F4A7C15 & MASK) for i in range(1, 13)]

    def forward(self, x: int) -> int:
        while (x := self._rounds(x, self.keys, +1)) >= self.n:
            pass
        return x

    def inverse(self, y: int) -> int:
        while (y := self._rounds(y, self.keys[::-1], -1)) >= self.n:
            pass
        return y

    def _rounds(self, x: int, keys: list[int], sign: int) -> int:
        high, low = x >> self.low, x % (1 << self.low)
        for i, key in enumerate(keys):
            if (i % 2 == 0) == (sign > 0):
                high = (high + sign * (mix(low + key & MASK) >> (64 - self.high))) % (
                    1 << self.high
                )
            else:
                low = (low + sign * (mix(high + key & MASK) >> (64 - self.low))) % (1 << self.low)
        return (high << self.low) + low
