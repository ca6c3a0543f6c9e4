"""Digests of the global random generators. Looking at a generator does not draw from it."""

from __future__ import annotations

import random
import sys
from array import array
from typing import Any

import torch

from .digests import digest_of


def generator_digests() -> dict[str, str]:
    """Return a digest for each global generator that this process has.

    Example:
        >>> before = generator_digests()
        >>> before == generator_digests()
        True
        >>> _ = torch.rand(1)
        >>> sorted(name for name, digest in generator_digests().items() if digest != before[name])
        ['torch']
    """
    digests = {"python": _python(), "torch": digest_of(torch.get_rng_state().numpy().data)}
    if "numpy.random" in sys.modules:
        digests["numpy"] = _numpy()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index in range(torch.cuda.device_count()):
            state = torch.cuda.get_rng_state(index)
            digests[f"cuda:{index}"] = digest_of(state.numpy().data)
    return digests


def _python() -> str:
    version, words, next_gauss = random.getstate()
    return digest_of(array("Q", words).tobytes() + f"{version} {next_gauss}".encode())


def _numpy() -> str:
    import numpy as np

    state: Any = np.random.get_state(legacy=True)
    kind, key, position, has_gauss, gauss = state
    return digest_of(key.tobytes() + f"{kind} {position} {has_gauss} {gauss}".encode())
