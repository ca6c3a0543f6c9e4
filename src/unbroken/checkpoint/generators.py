"""Whether ranks draw the same random numbers: one state is saved for all of them."""

from __future__ import annotations

import xxhash

from unbroken.capture import capture_rng, encode, structure_to_bytes


def rng_digest() -> str:
    """Return a digest of the states of this process's global random generators on the CPU.

    Example:
        >>> rng_digest() == rng_digest()
        True
    """
    tree = {name: state for name, state in capture_rng().items() if name != "cuda"}
    encoded = encode(tree)
    digest = xxhash.xxh3_128(structure_to_bytes(encoded.structure))
    for leaf in encoded.leaves:
        for chunk in leaf.chunks():
            digest.update(chunk)
    return digest.hexdigest()
