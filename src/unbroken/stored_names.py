"""Names that stand in checkpoints: fixed, whatever the code calls a class, function or field.

A checkpoint tells of what class each object was, and of which functions a run was made; a resume
compares both. So a class of this library that has a state, or can stand in the facts of a run, is
given its stored name for good with `stored_name`, and may then be renamed and moved. A field of a
dataclass that is written by its name keeps that name in `stored_key`. Never change a stored name:
`tests/test_stored_names.py` holds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, TypeVar

_NAME, _KEY = "__stored_name__", "stored"
_Thing = TypeVar("_Thing", bound=Callable[..., Any])


def stored_name(path: str) -> Callable[[_Thing], _Thing]:
    """Fix the name by which checkpoints know a class or function of this library.

    It is not inherited: a class that a user makes of this one has a name of its own.

    Args:
        path: Module and name, as they were when it was first stored: "unbroken.data.Source".

    Example:
        >>> @stored_name("unbroken.first.Name")
        ... class Renamed: ...
        >>> stored_path(Renamed), stored_class_name(Renamed)
        ('unbroken.first.Name', 'Name')
    """

    def mark(thing: _Thing) -> _Thing:
        setattr(thing, _NAME, path)
        return thing

    return mark


def given_path(thing: object) -> str | None:
    """Return the stored name of a class or function that was given one; None: it has none.

    Example:
        >>> given_path(dict)
    """
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:  # of a built-in function
        return None
    path = own.get(_NAME)
    return path if isinstance(path, str) else None


def stored_path(thing: Any) -> str:
    """Return the module and name of a class or function as checkpoints have them.

    Example:
        >>> import textwrap
        >>> stored_path(textwrap.dedent)
        'textwrap.dedent'
    """
    return given_path(thing) or f"{thing.__module__}.{thing.__qualname__}"


def stored_class_name(kind: type) -> str:
    """Return the name of a class, without its module, as checkpoints have it.

    Example:
        >>> stored_class_name(dict)
        'dict'
    """
    path = given_path(kind)
    return kind.__name__ if path is None else path.rpartition(".")[2]


def stored_key(name: str) -> Mapping[str, str]:
    """Return the metadata of a dataclass field that is written under another name than its own.

    Example:
        >>> from dataclasses import dataclass, field
        >>> @dataclass
        ... class Place:
        ...     seen: int = field(default=0, metadata=stored_key("samples"))
        >>> to_stored(Place(3)), from_stored(Place, {"samples": 3})
        ({'samples': 3}, Place(seen=3))
    """
    return {_KEY: name}


def to_stored(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by their stored names; values are not copied."""
    return {_key_of(one): getattr(value, one.name) for one in fields(value)}


def from_stored(kind: Any, values: Mapping[str, Any]) -> Any:
    """Return a dataclass from its fields by their stored names.

    Raises:
        TypeError: A name is not known, or a field without a default is missing.
    """
    names = {_key_of(one): one.name for one in fields(kind)}
    return kind(**{names.get(key, key): value for key, value in values.items()})


def _key_of(field: Field[Any]) -> str:
    return str(field.metadata.get(_KEY, field.name))
