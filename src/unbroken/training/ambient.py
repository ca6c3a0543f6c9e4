"""The global random generators at the start of a run."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_ambient(key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (on all devices) from one key.

    What a run draws from them outside of keyed scopes, in callbacks say, repeats with it.

    Args:
        key: 64 bits.
    """
    random.seed(key)
    np.random.seed((key & 0xFFFFFFFF, key >> 32))
    torch.manual_seed(key)
