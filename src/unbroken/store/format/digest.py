"""The digest of the format: XXH3 with 128 bits, as 32 lower-case hexadecimal digits.

It finds every accident; it does not stop an attacker, who can compute it too.
Source: Yann Collet, XXH3, https://github.com/Cyan4973/xxHash
"""

from __future__ import annotations

import re

import xxhash

from unbroken.storage import Bytes

_DIGEST = re.compile(r"[0-9a-f]{32}")


class Digester:
    """Compute the digest of bytes that come in pieces.

    Example:
        >>> digester = Digester()
        >>> digester.update(b"unbr")
        >>> digester.update(b"oken")
        >>> digester.digest() == digest_of(b"unbroken")
        True
    """

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: Bytes) -> None:
        """Add bytes; nothing is copied."""
        self._state.update(data)

    def digest(self) -> str:
        """Return the digest of all bytes so far."""
        found: str = self._state.hexdigest()
        return found


def digest_of(data: Bytes) -> str:
    """Return the digest of `data`.

    Example:
        >>> digest_of(b"")
        '99aa06d3014798d86001c324468d497f'
    """
    found: str = xxhash.xxh3_128_hexdigest(data)
    return found


def is_digest(text: str) -> bool:
    """Return whether `text` is spelled like a digest.

    Example:
        >>> is_digest("99AA06D3014798D86001C324468D497F")
        False
    """
    return _DIGEST.fullmatch(text) is not None
