"""JSON that has one spelling, and the digest of bytes: the same value has the same bytes.

Keys are sorted, nothing is put between tokens, and everything beyond ASCII is escaped:
`json.dumps(value, sort_keys=True, separators=(",", ":"))`. Nothing else is read.

The digest is XXH3 with 128 bits, as 32 lower-case hexadecimal digits. It finds every accident; it
does not stop an attacker, who can compute it too.
Source: Yann Collet, XXH3, https://github.com/Cyan4973/xxHash
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeAlias

import xxhash

from unbroken.errors import CaptureError
from unbroken.storage import Bytes

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

MAX_DEPTH = 64
_PLAIN = (str, int)  # and bool, which is an int


class MalformedError(ValueError):
    """Bytes that are not what the format says; readers add the name of the file."""

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


_Path: TypeAlias = "tuple[str | int | _Path, ...]"
"""The path of a value: that of what holds it, and its key there; the outermost has its name."""


def _plain(value: object, path: _Path, depth: int) -> object:
    """Return `value` with plain lists and dicts, refusing what `json.dumps` would bend."""
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth > 0 and isinstance(value, (list, tuple)):
        return [_plain(item, (path, i), depth - 1) for i, item in enumerate(value)]
    if depth > 0 and isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CaptureError(
                    _path_text(path), "has a key that is not a string", found=repr(key)
                )
        return {key: _plain(item, (path, key), depth - 1) for key, item in value.items()}
    raise CaptureError(_path_text(path), "cannot be written as JSON", found=repr(value)[:100])


def _path_text(path: _Path) -> str:
    """Return a path as messages spell it: "facts.loss[0]"."""
    if len(path) == 1:
        return str(path[0])
    outer, key = path
    held_by = _path_text(outer) if isinstance(outer, tuple) else str(outer)
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


# Strict reading of a JSON object: every field is there, of its type, and no other is.


MAX_COUNT = 2**63 - 1  # what a signed 64-bit reader can hold
MAX_TEXT = 4096


class Fields:
    """Take the fields out of a JSON object one by one, then be `done`.

    Args:
        value: What should be an object.
        what: How messages call it.

    Example:
        >>> fields = Fields({"step": 10}, "manifest")
        >>> fields.count("step"), fields.done()
        (10, None)
    """

    def __init__(self, value: Json, what: str) -> None:
        if not isinstance(value, dict):
            raise MalformedError(f"{what} is not an object", found=type(value).__name__)
        self._rest: dict[str, Json] = dict(value)
        self._what = what

    def has(self, name: str) -> bool:
        """Return whether a field is still to be taken."""
        return name in self._rest

    def value(self, name: str) -> Json:
        """Take a field of any type."""
        if name not in self._rest:
            raise MalformedError(f"{self._what} has no {name!r}")
        return self._rest.pop(name)

    def text(self, name: str, longest: int = MAX_TEXT) -> str:
        """Take a string that is not empty and not longer than `longest` characters."""
        value = self.value(name)
        if not isinstance(value, str) or not 0 < len(value) <= longest:
            self._refuse(name, f"1 to {longest} characters", value)
        return value

    def count(self, name: str, most: int = MAX_COUNT) -> int:
        """Take an integer from 0 to `most`."""
        return self._checked_count(name, self.value(name), most)

    def counts(self, name: str, longest: int) -> tuple[int, ...]:
        """Take a list of at most `longest` integers that are not negative."""
        values = self.items(name, longest)
        return tuple(self._checked_count(name, value, MAX_COUNT) for value in values)

    def items(self, name: str, longest: int) -> list[Json]:
        """Take a list of at most `longest` items."""
        value = self.value(name)
        if not isinstance(value, list) or len(value) > longest:
            self._refuse(name, f"a list of at most {longest} items", value)
        return value

    def done(self) -> None:
        """Refuse what was not taken."""
        if self._rest:
            unknown = min(self._rest)
            raise MalformedError(f"{self._what} has an unknown field", found=repr(unknown))

    def _checked_count(self, name: str, value: Json, most: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            self._refuse(name, f"an integer from 0 to {most}", value)
        return value

    def _refuse(self, name: str, expected: str, found: Json) -> NoReturn:
        what = f"{self._what} has an impossible {name!r}"
        raise MalformedError(what, expected, repr(found)[:100])


# Digests.


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
