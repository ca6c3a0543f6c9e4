"""Whether ranks draw the same random numbers: one state is saved for all of them."""

from __future__ import annotations

from unbroken.capture import capture_rng
from unbroken.checkpoint.shares import state_digest


def rng_digest() -> str:
    """Return a digest of the states of this process's global random generators on the CPU.

    Example:
        >>> rng_digest() == rng_digest()
        True
    """
    return state_digest({name: state for name, state in capture_rng().items() if name != "cuda"})
