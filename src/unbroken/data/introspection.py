"""Questions to data sets and loaders of users, whose `__getattr__` may answer any name."""

from __future__ import annotations

from typing import Any

from unbroken.errors import DataError

_NOBODY_HAS_THIS = "_unbroken_asks_for_a_name_that_nobody_has"


def has(thing: object, name: str) -> bool:
    """Return whether an object really has an attribute.

    One whose `__getattr__` answers any name has only those that it or its class holds; what
    Python itself calls (`__len__`) stands in the class.

    Example:
        >>> has([], "append"), has([], "state_dict")
        (True, False)
    """
    if name.startswith("__"):
        return hasattr(type(thing), name)
    return is_held(thing, name) or (hasattr(thing, name) and not answers_anything(thing))


def is_held(thing: object, name: str) -> bool:
    """Return whether an object or its class holds a name, without asking `__getattr__`."""
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        own = {}
    return name in own or hasattr(type(thing), name)


def is_of(thing: object, package: str) -> bool:
    """Return whether the class of an object comes from a package.

    Example:
        >>> import numpy
        >>> is_of(numpy.ones(1), "numpy"), is_of([], "numpy")
        (True, False)
    """
    return type(thing).__module__.partition(".")[0] == package


def answers_anything(thing: object) -> bool:
    """Return whether an object's `__getattr__` has an answer to any name."""
    return hasattr(type(thing), "__getattr__") and hasattr(thing, _NOBODY_HAS_THIS)


def declared(data: Any, name: str) -> Any:
    """Return what a data set says of itself in an attribute, or None.

    Raises:
        DataError: Its property raises.

    Example:
        >>> declared([1, 2], "fingerprint") is None
        True
    """
    try:
        return getattr(data, name, None) if has(data, name) else None
    except Exception as error:
        raise DataError(
            f"{type(data).__name__}.{name}",
            "cannot be read from the data set",
            found=f"{type(error).__name__}: {error}",
            hint="Leave it out, or let it return its value.",
        ) from error
