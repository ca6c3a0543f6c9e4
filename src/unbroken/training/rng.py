"""Two kinds of global randomness: keyed inside the loop, ambient outside of it."""

from __future__ import annotations

import os
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
        ...     with randomness.users_generators():
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
    def users_generators(self) -> Iterator[None]:
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


# Deterministic kernels for the length of a run, the user's settings put back after it.


@contextmanager
def deterministic_kernels(enabled: bool, device: torch.device) -> Iterator[None]:
    """Use only kernels that give the same bits each time; put the settings back on leaving.

    Args:
        enabled: False leaves everything as it is.
        device: On "cuda" the cuBLAS workspace is fixed too, unless the environment already
            says how (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).

    Example:
        >>> with deterministic_kernels(True, torch.device("cpu")):
        ...     torch.are_deterministic_algorithms_enabled()
        True
    """
    if not enabled:
        yield
        return
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling only hides reads of uninitialised memory; it costs time and no result depends on it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
