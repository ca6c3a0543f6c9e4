"""Keys: 64-bit numbers derived from a seed and names, the root of everything that is not stored.

A key is a pure function of the seed and of what it is for, so nothing random has to be saved:
the order of epoch 7 is `derive_key(seed, "order", 7)`, today and in every later version.
"""

from __future__ import annotations

from hashlib import blake2b
from operator import index

_PERSON = b"unbroken-key-1"


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
