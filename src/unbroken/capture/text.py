"""The structure of a state tree as JSON text, and strictly back."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from unbroken.errors import CorruptCheckpointError

Json = Any
"""A value of JSON: None, bool, int, float, str, list or dict with str keys."""

TAG = "$"
"""The key that marks a JSON object as a typed value and not as a plain dict."""

MAX_DEPTH = 64
"""How deep a state tree may be nested."""

EXACT_INT = 2**53
"""Below this size every reader of JSON keeps an integer exactly."""


def structure_to_bytes(structure: Json) -> bytes:
    r"""Return the structure as one line of JSON text, keys in the order of insertion.

    Args:
        structure: `Encoded.structure`.

    Example:
        >>> structure_to_bytes({"step": 3})
        b'{"step": 3}\n'
    """
    return (json.dumps(structure, allow_nan=False) + "\n").encode("ascii")


def structure_from_bytes(raw: bytes, where: str) -> Json:
    """Read what `structure_to_bytes` wrote; anything else is refused, not repaired.

    Args:
        raw: The bytes of the file.
        where: The file; for the message.

    Raises:
        CorruptCheckpointError: Not JSON, or with duplicate keys, NaN tokens, integers that other
            readers would round, or nested too deep.
    """

    def refuse(token: str) -> NoReturn:
        raise ValueError(f"not a JSON value: {token[:40]}")

    def exact_int(digits: str) -> int:
        if len(digits) > len(str(EXACT_INT)) + 1 or abs(int(digits)) >= EXACT_INT:
            refuse(digits)
        return int(digits)

    try:
        return json.loads(
            raw.decode("utf-8"),
            parse_constant=refuse,
            parse_int=exact_int,
            object_pairs_hook=_without_duplicates,
        )
    except RecursionError as error:
        raise CorruptCheckpointError(where, "nested too deep") from error
    except ValueError as error:
        raise CorruptCheckpointError(where, f"not a state structure: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result
