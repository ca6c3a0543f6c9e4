"""JSON that has one spelling: the same value is always the same bytes, and nothing else is read.

Keys are sorted, nothing is put between tokens, and everything beyond ASCII is escaped:
`json.dumps(value, sort_keys=True, separators=(",", ":"))`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeAlias

from unbroken.errors import CaptureError

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MAX_DEPTH = 64
_PLAIN = (str, int)  # and bool, which is an int


class MalformedError(ValueError):
    """Bytes that are not what the format says; readers turn it into an error with a place."""

    def __init__(self, what: str, expected: object = None, found: object = None) -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.found = found


def to_canonical(value: Json, where: str = "value") -> bytes:
    """Return the one spelling of a JSON value.

    Args:
        value: None, bool, int, finite float, str, and sequences and string-keyed mappings of these.
        where: How messages call it.

    Raises:
        CaptureError: JSON has no spelling for a part of it; `where` names the part.

    Example:
        >>> to_canonical({"step": 10, "facts": (1.5, None)})
        b'{"facts":[1.5,null],"step":10}'
    """
    return spelled(plain(value, where))


def plain(value: Json, where: str) -> object:
    """Return a JSON value in plain lists and dicts; raises as `to_canonical` does."""
    return _plain(value, (where,), MAX_DEPTH)


def spelled(value: object) -> bytes:
    """Return the one spelling of a value that is known to be plain: nothing of it is checked."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


_Place: TypeAlias = "tuple[str | int | _Place, ...]"
"""Where a value stands: the place of what holds it, and its key there; the outermost by name."""


def _plain(value: object, place: _Place, depth: int) -> object:
    """Return `value` with plain lists and dicts, refusing what `json.dumps` would bend."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth > 0 and isinstance(value, (list, tuple)):
        return [_plain(item, (place, i), depth - 1) for i, item in enumerate(value)]
    if depth > 0 and isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CaptureError(
                    _place_name(place), "has a key that is not a string", found=repr(key)
                )
        return {key: _plain(item, (place, key), depth - 1) for key, item in value.items()}
    raise CaptureError(_place_name(place), "cannot be written as JSON", found=repr(value)[:100])


def _place_name(place: _Place) -> str:
    """Return "facts.loss[0]" for a place; needed for messages alone."""
    if len(place) == 1:
        return str(place[0])
    outer, key = place
    held_by = _place_name(outer) if isinstance(outer, tuple) else str(outer)
    return f"{held_by}[{key}]" if isinstance(key, int) else f"{held_by}.{key}"


def from_strict(raw: bytes) -> Json:
    """Return the JSON value that `raw` spells, and nothing that JSON does not have.

    Raises:
        MalformedError: Not JSON, a key given twice, NaN or Infinity, or nested absurdly deep.

    Example:
        >>> from_strict(b'{"step":10}')
        {'step': 10}
    """
    try:
        value: Json = json.loads(raw, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except MalformedError:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise MalformedError(f"is not JSON ({error})") from None
    return value


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for key, value in pairs:
        if key in found:
            raise MalformedError("gives a key twice", found=repr(key))
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedError("has a number that JSON does not have", found=name)
