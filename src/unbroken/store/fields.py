"""Strict reading of a JSON object: every field is there, of its type, and no other is."""

from __future__ import annotations

from typing import NoReturn

from unbroken.store.canonical import Json, MalformedError

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
