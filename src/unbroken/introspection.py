"""Ask objects of users for attributes and results, whatever their code answers or raises."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, MemberDescriptorType
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


# Ask objects of users for attributes and results: whatever their code raises, nothing fails.


@dataclass(frozen=True)
class Failed:
    """What a call raised."""

    error: Exception


def try_call(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's code; return its result, or `Failed` with what it raised."""
    try:
        return call(*arguments)
    except Exception as error:  # users' code runs here, and a fact must never end a run
        return Failed(error)


def safe_getattr(thing: object, name: str) -> Any:
    """Return an attribute, or None where there is none or its property raises.

    Of an object that answers any name, only what it or its class holds counts.
    """
    found = try_call(getattr, thing, name, None)
    made_up = found is not None and try_call(has, thing, name) is not True
    return None if made_up or isinstance(found, Failed) else found


def safe_call(thing: object, method: str) -> Any:
    """Return what a method without arguments returns, or None where there is none or it raises."""
    call = safe_getattr(thing, method)
    found = try_call(call) if callable(call) else None
    return None if isinstance(found, Failed) else found


def attributes_of(thing: object) -> dict[str, Any]:
    """Return the attributes in an object itself, slots too, without running any code of it."""
    kind: Any = type(thing)
    slots = {name: try_call(member.__get__, thing) for name, member in _slots(kind)}
    found = {name: value for name, value in slots.items() if not isinstance(value, Failed)}
    own = try_call(object.__getattribute__, thing, "__dict__")
    return {**found, **own} if isinstance(own, dict) else found


@functools.lru_cache(maxsize=512)
def _slots(owner: Any) -> list[tuple[str, MemberDescriptorType]]:
    members = (item for base in owner.__mro__ for item in vars(base).items())
    return [(name, one) for name, one in members if isinstance(one, MemberDescriptorType)]


def variables_of(frame: FrameType) -> dict[str, Any]:
    """Return the variables of a frame by name, and leave no reference to them in it.

    Before Python 3.13 a frame that was asked for `f_locals` keeps what it answered until it is
    asked again: `del model` in that function frees nothing.

    Source: PEP 667, https://peps.python.org/pep-0667/

    Example:
        >>> import sys
        >>> def here():
        ...     one = 1
        ...     return variables_of(sys._getframe())
        >>> here()
        {'one': 1}
    """
    found = frame.f_locals
    variables = dict(found)
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        found.clear()
    return variables
