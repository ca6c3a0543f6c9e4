"""Comparing two trees of values, path by path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from unbroken.store.canonical import Json
from unbroken.store.value_tree import HAS_LENGTH, HAS_ORDER, VALUE, Node


@dataclass(frozen=True)
class ValueDifference:
    """A value that is not the same on both sides.

    Attributes:
        path: Its path: "config.learning_rate", "scheduler.last_epoch".
        kind: "changed"; "only in a"; "only in b"; "order": the same keys in another order.
        a: The value of the first side; None where it has none.
        b: The value of the second side; None where it has none.

    Example:
        >>> ValueDifference("config.seed", "changed", 1, 2).kind
        'changed'
    """

    path: str
    kind: Literal["changed", "only in a", "only in b", "order"]
    a: Json
    b: Json


@dataclass(frozen=True)
class ValueGroup:
    """Values of one kind, compared.

    Attributes:
        name: "config", "environment", "state", "files", ...
        count: How many values there are in it, on the side that has more.
        differences: Those that differ.
        trees: Both sides whole, where they are JSON.

    Example:
        >>> ValueGroup("config", 52, ()).count
        52
    """

    name: str
    count: int
    differences: tuple[ValueDifference, ...]
    trees: tuple[Node, Node] | None = field(default=None, repr=False, compare=False)

    def same(self) -> dict[str, Json]:
        """Return the values that are the same on both sides, by their paths.

        Example:
            >>> from unbroken.store.value_tree import plain_tree
            >>> a, b = plain_tree({"lr": 1, "seed": 1}), plain_tree({"lr": 2, "seed": 1})
            >>> diff_trees("", a, b, exact=False).same()
            {'seed': 1}
        """
        return {} if self.trees is None else dict(_same(*self.trees, ""))


def diff_trees(
    name: str, a: Node, b: Node, *, exact: bool, told: frozenset[str] = frozenset()
) -> ValueGroup:
    """Compare two trees.

    Args:
        name: The name of the group that they are.
        a: The first tree.
        b: The second tree.
        exact: Whether the type of a number, the sign of zero and the order of keys are part of a
            value; otherwise 1 is 1.0.
        told: Leaves of which the manifests tell that one side lacks them, or has them in another
            type: nothing is said of them here.

    Example:
        >>> from unbroken.store.value_tree import plain_tree
        >>> a, b = plain_tree({"lr": 1, "seed": 1}), plain_tree({"lr": 1.0, "seed": 2})
        >>> [one.path for one in diff_trees("config", a, b, exact=False).differences]
        ['seed']
    """
    count = max(sum(end.leaf is None for end in node.ends()) for node in (a, b))
    found = () if a is b else tuple(_Comparison(exact, told).differences(a, b, ""))
    return ValueGroup(name, count, found, (a, b))


def _same(a: Node, b: Node, path: str) -> Iterator[tuple[str, Json]]:
    """Yield the values that are the same at the same path; those with leaves are tensors."""
    path = (path + a.end).removeprefix(".")
    if a.leaf is not None or a.kind != b.kind:
        return
    if a.kind == VALUE and json.dumps(a.raw) == json.dumps(b.raw):
        yield path, a.raw
    for key in a.parts.keys() & b.parts.keys():
        yield from _same(a.parts[key], b.parts[key], path)


@dataclass(frozen=True)
class _Comparison:
    """How two trees are compared.

    Attributes:
        exact: Whether types, the sign of zero and the order of keys are part of a value.
        told: Leaves that one side lacks, or has in another type: told by the manifests.
    """

    exact: bool
    told: frozenset[str]

    def differences(self, a: Node, b: Node, path: str) -> Iterator[ValueDifference]:
        """Yield what differs between two nodes at the same path."""
        path = (path + a.end).removeprefix(".")
        as_a_whole = a.kind != b.kind or a.kind == VALUE
        if as_a_whole or (a.kind in HAS_LENGTH and len(a.parts) != len(b.parts)):
            if not self._is_same(a.raw, b.raw):
                yield ValueDifference(path, "changed", a.raw, b.raw)
        elif a.leaf is None or a.leaf not in self.told:
            yield from self._inside(a, b, path)

    def _inside(self, a: Node, b: Node, path: str) -> Iterator[ValueDifference]:
        for key, one in a.parts.items():
            if key in b.parts:
                yield from self.differences(one, b.parts[key], path)
            elif not self._is_told(one):
                yield ValueDifference(
                    (path + one.end).removeprefix("."), "only in a", one.raw, None
                )
        for key, other in b.parts.items():
            if key not in a.parts and not self._is_told(other):
                end = (path + other.end).removeprefix(".")
                yield ValueDifference(end, "only in b", None, other.raw)
        keys, others = [*a.parts], [*b.parts]
        is_moved = keys != others and sorted(keys) == sorted(others)
        if self.exact and a.kind in HAS_ORDER and is_moved:
            yield ValueDifference(path, "order", keys, others)

    def _is_told(self, node: Node) -> bool:
        """Tell whether there is nothing in it but leaves that the manifests tell of."""
        ends = [end.leaf for end in node.ends()]
        return bool(ends) and all(leaf in self.told for leaf in ends)

    def _is_same(self, a: Json, b: Json) -> bool:
        is_equal_number = _is_number(a) and _is_number(b) and a == b
        return (is_equal_number and not self.exact) or json.dumps(a) == json.dumps(b)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
