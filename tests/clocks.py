"""Clocks for tests: seconds that do not pass by themselves."""

from __future__ import annotations

import random


class Jumping:
    """A clock that jumps by as much as a seed says, each time that it is read."""

    def __init__(self, seed: int) -> None:
        self._rng, self._now = random.Random(seed), 0.0

    def __call__(self) -> float:
        self._now += self._rng.expovariate(1 / 3)
        return self._now
