"""Two kinds of global randomness: keyed inside the loop, ambient outside of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from unbroken.data import KeyedRandom


class Randomness:
    """Keeps the global generators keyed in the loop, and ambient before, after and in saves.

    The ambient generators are those of the user's script, and belong to each checkpoint. They
    are put away once, when the loop begins: swapping them around each forward pass would cost
    more than a small model's step.

    Args:
        cuda: Also the generator of the current CUDA device.

    Example:
        >>> randomness = Randomness(cuda=False)
        >>> before = torch.get_rng_state()
        >>> with randomness.keyed():
        ...     randomness.seed(7)
        ...     with randomness.ambient():
        ...         bool((torch.get_rng_state() == before).all())
        True
    """

    def __init__(self, *, cuda: bool) -> None:
        self._scope = KeyedRandom(cuda=cuda)
        self._is_keyed = False

    def seed(self, key: int) -> None:
        """Restart the global generators from a key; only inside `keyed`."""
        self._scope.seed(key)

    @contextmanager
    def keyed(self) -> Iterator[None]:
        """Put the ambient generators away; they are back on leaving."""
        with self._scope:
            self._is_keyed = True
            try:
                yield
            finally:
                self._is_keyed = False

    @contextmanager
    def keyed_by(self, key: int) -> Iterator[None]:
        """Run user code whose draws depend on the key alone, wherever in the run it is called."""
        if self._is_keyed:
            self._scope.seed(key)
            yield
            return
        with self.keyed():
            self._scope.seed(key)
            yield

    @contextmanager
    def ambient(self) -> Iterator[None]:
        """Put the ambient generators back for a while; outside of `keyed` they are there."""
        if not self._is_keyed:
            yield
            return
        self._scope.__exit__(None, None, None)
        self._is_keyed = False
        try:
            yield
        finally:
            self._scope.__enter__()
            self._is_keyed = True


def seed_ambient(key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (on all devices) from one key.

    What a run draws from them outside of keyed scopes, in callbacks say, repeats with it.

    Args:
        key: 64 bits.
    """
    random.seed(key)
    np.random.seed((key & 0xFFFFFFFF, key >> 32))
    torch.manual_seed(key)
