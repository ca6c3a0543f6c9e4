"""The state tree: nested Python values whose leaves are tensors, arrays and scalars.

Also what the functions of a kind take and give: `Captured`, `State`, `Mismatch`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from unbroken.capture.tensors import comes_apart, is_sharded, parts_of
from unbroken.errors import CaptureError, StateMismatchError

_SHOWN = 5  # mismatches in one error


@dataclass(frozen=True)
class Captured:
    """What was captured of one live object: its kind, its class, and its state as a tree.

    Args:
        kind: The entry of the table in `objects.py` that captured it: "module", "optimizer", ...
        class_name: The name of the object's class; shown, and compared when restoring.
        state: The state itself. In the paths of leaves it stands at the object's own path.
        facts: What else belongs to the object. A fact's path is ``<object>:<fact>``.
    """

    kind: str
    class_name: str
    state: Any
    facts: Mapping[str, Any] = field(default_factory=dict)


State = tuple[Any, dict[str, Any]]
"""What the functions that capture return: an object's state, and its facts."""


@dataclass(frozen=True)
class Mismatch:
    """One reason why a checkpoint does not fit: it holds `expected`, and here is `found`."""

    where: str
    what: str
    expected: object = None
    found: object = None

    def __str__(self) -> str:
        """Return *where: what: expected X, found Y*."""
        return str(
            StateMismatchError(self.where, self.what, expected=self.expected, found=self.found)
        )


def raise_all(mismatches: Iterable[Mismatch], hint: str | None = None) -> None:
    """Raise one error that lists the first mismatches and counts the rest; none: return."""
    found = list(mismatches)
    if not found:
        return
    if len(found) == 1:
        only = found[0]
        raise StateMismatchError(
            only.where, only.what, expected=only.expected, found=only.found, hint=hint
        )
    lines = [f"\n  {mismatch}" for mismatch in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"\n  and {len(found) - _SHOWN} more")
    raise StateMismatchError(
        "checkpoint", f"does not fit, in {len(found)} places:{''.join(lines)}", hint=hint
    )


def is_namedtuple(value: object) -> bool:
    """Return whether `value` is exactly a named tuple: no subclass that could hold more."""
    kind = type(value)
    return (
        isinstance(value, tuple)
        and kind.__bases__ == (tuple,)
        and isinstance(getattr(kind, "_fields", None), tuple)
    )


def children(value: object) -> Iterator[object]:
    """Yield the values directly inside a container of a state tree."""
    if isinstance(value, Captured):
        yield value.state
        yield from value.facts.values()
    elif isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        yield from value


def refuse_sharded(value: Any, path: str) -> None:
    """Raise if a sharded tensor stands in a state that is given back as a whole."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if is_sharded(one):
            hint = "give the module or optimizer itself: their sharded tensors are filled in place"
            raise CaptureError(
                path,
                "holds a sharded tensor",
                found=f"a DTensor of shape {list(one.shape)}",
                hint=hint,
            )
        if id(one) not in seen:
            seen.add(id(one))
            todo.extend(children(one))


def types_in(tree: object) -> frozenset[type]:
    """Return the enum, named-tuple and tensor classes that occur in `tree`.

    They are what `decode` may be given as `types` for a tree of the same shape.

    Args:
        tree: A state tree.

    Example:
        >>> from collections import namedtuple
        >>> Point = namedtuple("Point", "x y")
        >>> types_in({"at": [Point(1, 2)]}) == {Point}
        True
    """
    found: set[type] = set()
    seen: set[int] = set()
    todo = [tree]
    while todo:
        value = todo.pop()
        if isinstance(value, Enum) or is_namedtuple(value):
            found.add(type(value))
        if comes_apart(value):
            found.add(type(value))
            todo.extend(parts_of(value))
        if id(value) not in seen:
            seen.add(id(value))
            todo.extend(children(value))
    return frozenset(found)


class TreeMap:
    """Rebuilds a tree with `change` applied to every value that is no container.

    Containers that occur twice are rebuilt once, so that they are shared in the result too.
    """

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self._change = change
        self._done: dict[int, Any] = {}

    def __call__(self, tree: Any) -> Any:
        """Return the rebuilt tree."""
        if id(tree) not in self._done:
            self._done[id(tree)] = self._rebuilt(tree)
        return self._done[id(tree)]

    def _rebuilt(self, tree: Any) -> Any:
        if isinstance(tree, Captured):
            facts = {key: self(value) for key, value in tree.facts.items()}
            return replace(tree, state=self(tree.state), facts=facts)
        if isinstance(tree, defaultdict):
            return defaultdict(tree.default_factory, self._pairs(tree))
        if isinstance(tree, (dict, OrderedDict)) and not isinstance(tree, Counter):
            return type(tree)(self._pairs(tree))
        if isinstance(tree, deque):
            return deque(map(self, tree), tree.maxlen)
        if type(tree) in (list, tuple):
            return type(tree)(map(self, tree))
        if is_namedtuple(tree):
            return tuple.__new__(type(tree), map(self, tree))
        return self._change(tree)

    def _pairs(self, tree: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
        return [(key, self(value)) for key, value in tree.items()]


def is_named(value: Any) -> bool:
    """Return whether a decoded value is a dict with names as keys."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_names(value: Any) -> bool:
    """Return whether a decoded value is a list of names."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
