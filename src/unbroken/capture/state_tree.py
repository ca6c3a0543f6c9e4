"""The state tree: nested Python values whose leaves are tensors, arrays and scalars."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from unbroken.capture.tensor_subclasses import comes_apart, parts_of


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


def is_namedtuple(value: object) -> bool:
    """Tell whether `value` is exactly a named tuple: no subclass that could hold more."""
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
