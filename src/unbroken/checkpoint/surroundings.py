"""What stands around a call in the user's own code: the objects that his frames hold, by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any

from unbroken.fingerprint import is_users_own

_MOST_FRAMES = 40
_MOST_ITEMS = 64
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type)
_GROUPS = (list, tuple, dict, set, frozenset)


def things_around() -> Iterator[tuple[str, object]]:
    """Yield what the callers of unbroken hold, each once: "scheduler", or "self.scheduler".

    These are the variables of the user's frames up the stack, of the functions in them that are
    closures, and of their modules; what is in lists and dictionaries; and the attributes of
    objects of the user's own classes. Nothing is called, and no property is asked.
    """
    seen: set[int] = set()
    for names in _scopes(sys._getframe(1)):  # noqa: SLF001 (has no public name)
        for name, value in list(names.items()):
            yield from _within(name, value, seen, depth=0)


def _scopes(frame: FrameType | None) -> Iterator[Mapping[str, Any]]:
    """Yield the variables of frames of the user's own code, and then of their modules."""
    modules: dict[int, Mapping[str, Any]] = {}
    for _ in range(_MOST_FRAMES):
        if frame is None:
            break
        if _is_users(frame.f_code, frame.f_globals):
            if frame.f_locals is not frame.f_globals:
                yield frame.f_locals
            modules.setdefault(id(frame.f_globals), frame.f_globals)
        frame = frame.f_back
    yield from modules.values()


_KNOWN: dict[CodeType, bool] = {}


def _is_users(code: CodeType, module: Mapping[str, Any]) -> bool:
    if code not in _KNOWN:
        cells = tuple(CellType() for _ in code.co_freevars)
        named = {"__name__": module.get("__name__")}
        _KNOWN[code] = is_users_own(FunctionType(code, named, closure=cells))
    return _KNOWN[code]


def _within(name: str, value: object, seen: set[int], *, depth: int) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if kind in _PLAIN or isinstance(value, type) or name.startswith("__") or id(value) in seen:
        return
    seen.add(id(value))
    if kind in _GROUPS:
        for key, item in _items(value):
            yield from _within(f"{name}[{key!r}]", item, seen, depth=depth)
    elif kind is FunctionType:
        for key, item in _closed_over(value):  # type: ignore[arg-type]
            yield from _within(key, item, seen, depth=depth + 1)
    else:
        yield name, value
        if depth < _DEEPEST and is_users_own(kind):
            for key, item in attributes(value).items():
                yield from _within(f"{name}.{key}", item, seen, depth=depth + 1)


_DEEPEST = 3


def _items(value: Any) -> Iterable[tuple[object, object]]:
    if len(value) > _MOST_ITEMS:
        return ()
    return list(value.items() if isinstance(value, dict) else enumerate(value))


def _closed_over(function: FunctionType) -> Iterator[tuple[str, object]]:
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it has no value yet
            continue


def attributes(thing: object) -> dict[str, Any]:
    """Return the attributes that an object itself holds; none of its code runs.

    Example:
        >>> class Ema:
        ...     def __init__(self) -> None:
        ...         self.decay = 0.9
        >>> attributes(Ema()), attributes(3)
        ({'decay': 0.9}, {})
    """
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        own = {}
    return dict(own) if isinstance(own, dict) else {}
