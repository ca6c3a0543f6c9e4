"""Keys: 64-bit numbers derived from a seed and names, the root of everything that is not stored.

A key is a pure function of the seed and of what it is for, so nothing random has to be saved:
the order of epoch 7 is `derive_key(seed, "order", 7)`, today and in every later version.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from operator import index
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from unbroken.errors import ConfigError
from unbroken.stored_names import stored_name

_PERSON = b"unbroken-key-1"


@stored_name("unbroken.data.keys.derive_key")
def derive_key(seed: int, *parts: int | str) -> int:
    """Return a 64-bit key that depends on the seed and on every part, the same for ever.

    Different arguments give independent keys: the parts are encoded with their type and
    length, so that `("ab", "c")`, `("a", "bc")`, `(1,)` and `("1",)` cannot meet.
    The key is BLAKE2b (RFC 7693) with an 8-byte digest, read as a little-endian number.

    Args:
        seed: Any integer, of any size and sign.
        *parts: What the key is for: integers of any size, and strings.

    Returns:
        An integer in [0, 2**64).

    Example:
        >>> hex(derive_key(42, "order", 0))
        '0xc77023e9a63cceea'
    """
    digest = blake2b(digest_size=8, person=_PERSON)
    digest.update(_encoded(seed))
    for part in parts:
        digest.update(_encoded(part))
    return int.from_bytes(digest.digest(), "little")


def _encoded(part: int | str) -> bytes:
    if isinstance(part, str):
        kind, raw = b"s", part.encode()
    else:
        number = index(part)
        kind, raw = b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return kind + len(raw).to_bytes(8, "little") + raw


# Randomness that depends on a key alone and leaves the ambient generators as they were.


_NUMPY_MASK = 0x9E3779B97F4A7C15


@stored_name("unbroken.data.randomness.KeyedRandom")
class KeyedRandom:
    """Inside the scope, each `seed(key)` restarts all global generators from that key.

    The global generators are Python's `random`, NumPy's legacy `numpy.random`, torch's CPU
    generator and, where asked, the generator of the current CUDA device. On leaving they
    hold exactly the state that they had on entering. One scope serves many keys: a key costs
    about 15 microseconds, entering and leaving together about 80.

    Generators made by the user (`numpy.random.default_rng()`, `torch.Generator()`) are not
    reached; seed them from one of the above, or do not make them inside a data set.

    Args:
        cuda: Also key the generator of the CUDA device that is current on entering.

    Example:
        >>> with KeyedRandom() as rng:
        ...     rng.seed(7)
        ...     first = random.random()
        ...     rng.seed(7)
        ...     first == random.random()
        True
    """

    def __init__(self, *, cuda: bool = False) -> None:
        self._cuda = cuda
        self._outer_state: tuple[Any, Any, torch.Tensor, torch.Tensor | None] | None = None
        self._cuda_generator: torch.Generator | None = None

    def __enter__(self) -> Self:
        if self._outer_state is not None:
            raise ConfigError("KeyedRandom", "the scope is already open", hint="Make another one.")
        if self._cuda:
            device = torch.cuda.current_device()
            self._cuda_generator = torch.cuda.default_generators[device]
        self._outer_state = (
            random.getstate(),
            np.random.get_state(legacy=False),
            torch.default_generator.get_state(),
            None if self._cuda_generator is None else self._cuda_generator.get_state(),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._outer_state is None:
            return
        python, numpy, cpu, cuda = self._outer_state
        self._outer_state = None
        random.setstate(python)
        np.random.set_state(numpy)
        torch.default_generator.set_state(cpu)
        if self._cuda_generator is not None and cuda is not None:
            self._cuda_generator.set_state(cuda)

    def seed(self, key: int) -> None:
        """Restart every global generator from the key.

        Python, NumPy and CUDA use all 64 bits of it, torch's CPU generator the low 32 (that is
        all its Mersenne Twister takes).

        Args:
            key: A 64-bit key, see `derive_key`.
        """
        random.seed(key)
        # NumPy's legacy generator seeds itself as Python's does: with the same key it would
        # give the very same numbers.
        other = key ^ _NUMPY_MASK
        np.random.seed((other & 0xFFFFFFFF, other >> 32))
        torch.default_generator.manual_seed(key)
        if self._cuda_generator is not None:
            self._cuda_generator.manual_seed(key)


class _SeededRandom(KeyedRandom):
    """A scope that begins with a key."""

    def __init__(self, key: int, *, cuda: bool) -> None:
        super().__init__(cuda=cuda)
        self._key = key

    def __enter__(self) -> Self:
        super().__enter__()
        self.seed(self._key)
        return self


@stored_name("unbroken.data.randomness.keyed_random")
def keyed_random(key: int, *, cuda: bool = False) -> KeyedRandom:
    """Return a scope in which all global generators start from the key.

    On leaving, the ambient state is back exactly as it was. Inside, `.seed(key)` starts
    again from another key, so one scope serves all micro-batches of an optimizer step.

    Args:
        key: A 64-bit key, see `derive_key`.
        cuda: Also key the generator of the current CUDA device.

    Returns:
        A context manager that gives a `KeyedRandom`.

    Example:
        >>> from unbroken.data import derive_key
        >>> with keyed_random(derive_key(42, "dropout", 3, 0)) as rng:
        ...     first = torch.rand(())
        ...     rng.seed(derive_key(42, "dropout", 3, 1))
        ...     second = torch.rand(())
        >>> with keyed_random(derive_key(42, "dropout", 3, 1)):
        ...     bool(second == torch.rand(()))
        True
    """
    return _SeededRandom(key, cuda=cuda)


# Two kinds of global randomness in a loop: keyed inside of it, ambient outside.


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
        """Save the ambient generators, and restore them on leaving."""
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
        """Restore the ambient generators inside this scope; outside of `keyed` do nothing."""
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
