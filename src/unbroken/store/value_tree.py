"""JSON as a tree of named values, so that two of them can be compared path by path.

Facts of a manifest are plain JSON. `state.json` is typed JSON: an object with the key "$" is one
value of another type, as `unbroken.capture` writes it. Both become the same kind of tree here,
without torch; a value of a type that this module does not know is compared as a whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from unbroken.store.canonical import Json, MalformedError

TAG = "$"
VALUE = "value"

_MAX_DEPTH = 70  # a state tree has at most 66 levels, facts have at most 64
_ELEMENTS = {"tuple", "namedtuple", "deque", "torch.Size"}
_PAIRS = {"dict", "OrderedDict", "Counter", "defaultdict"}
_IN_LEAVES = {"tensor", "numpy.ndarray", "bytes", "bytearray"}
_WITH_NODES = {"quantized": ("integers", "scale", "zero_point")}
_TENSORS = {"tensor", "quantized", "subclass"}
_COUNTED = {*_PAIRS, *_TENSORS, "deque", "set", "bytearray", "numpy.ndarray"}

HAS_ORDER = frozenset({"mapping", *_PAIRS})
"""Kinds of which the order of the keys is part of the value."""

HAS_LENGTH = frozenset({"list", *_ELEMENTS})
"""Kinds whose parts are counted, not named: of another length, they are another value."""


@dataclass(frozen=True)
class Node:
    """A value, or a group of values.

    Attributes:
        kind: "value", "mapping", "list", or the tag of typed JSON: "tuple", "object", "tensor", ...
        raw: It, as it stands in the JSON.
        parts: What it consists of, by key; none of a plain value. No two keys are the same, also
            where the paths are: 1 and "1" are two keys.
        end: What it adds to the path of its group: ".lr", ":class", or nothing.

    Example:
        >>> sorted(plain_tree({"lr": 0.1, "betas": [0.9]}).parts)
        ['betas', 'lr']
    """

    kind: str
    raw: Json
    parts: Mapping[str, Node] = field(default_factory=dict)
    end: str = ""

    @property
    def leaf(self) -> str | None:
        """The path of the leaf that has its bytes: of a tensor, an array, a long byte string."""
        return str(self.parts["field leaf"].raw) if self.kind in _IN_LEAVES else None

    def ends(self) -> Iterator[Node]:
        """Yield what is no group: the plain values, and what has its bytes in a leaf."""
        if self.kind == VALUE or self.leaf is not None:
            yield self
        else:
            for part in self.parts.values():
                yield from part.ends()


def plain_tree(value: Json, end: str = "", depth: int = 0) -> Node:
    """Return plain JSON as a tree.

    Args:
        value: The JSON value.
        end: What it adds to the path of its group.
        depth: How many groups it stands in.

    Raises:
        MalformedError: It is nested absurdly deep.

    Example:
        >>> plain_tree({"model": {"n_layer": 2}}).parts["model"].parts["n_layer"]
        Node(kind='value', raw=2, parts={}, end='.n_layer')
    """
    _check_depth(depth)
    if isinstance(value, Mapping):
        fields = {key: plain_tree(item, f".{key}", depth + 1) for key, item in value.items()}
        return Node("mapping", value, fields, end)
    if isinstance(value, list | tuple):
        items = {str(i): plain_tree(item, f".{i}", depth + 1) for i, item in enumerate(value)}
        return Node("list", value, items, end)
    return Node(VALUE, value, end=end)


def state_tree(structure: Json) -> Node:
    """Return the typed JSON of a state as a tree; the paths are those of the state's leaves.

    A reference to an object that occurred before is the path of that object, not its number:
    a value that was put in before both does not change it.

    Args:
        structure: What `state.json` holds.

    Raises:
        MalformedError: It is nested absurdly deep.

    Example:
        >>> tree = state_tree({"betas": {"$": "tuple", "items": [0.9, 0.95]}})
        >>> tree.parts["betas"].kind, [node.raw for node in tree.ends()]
        ('tuple', [0.9, 0.95])
    """
    return _Walk().node(structure, "", "")


class _Walk:
    """Goes through typed JSON in the order of its encoder, and counts what may occur twice."""

    def __init__(self) -> None:
        self._seen: list[str] = []
        self._times: Counter[str] = Counter()
        self._depth = 0

    def node(self, raw: Json, path: str, end: str) -> Node:
        """Return one node of any kind."""
        _check_depth(self._depth)
        path = (path + end).removeprefix(".")
        self._depth += 1
        kind, parts = self._parsed(raw, path)
        self._depth -= 1
        if kind == "same" and isinstance(raw, Mapping):
            return Node(VALUE, {**raw, "as": self._path_of(raw.get("as"))}, end=end)
        return Node(kind, raw, parts, end)

    def _parsed(self, raw: Json, path: str) -> tuple[str, dict[str, Node]]:
        tag = raw.get(TAG) if isinstance(raw, Mapping) else None
        if tag is not None and not isinstance(tag, str):
            return VALUE, {}
        if tag in _COUNTED or (isinstance(raw, Mapping | list) and tag is None):
            self._times[path] += 1  # {1: [], "1": []} has one path for two lists
            self._seen.append(f"{path}~{self._times[path]}" if self._times[path] > 1 else path)
        if isinstance(raw, list):
            return "list", self._elements(raw, path)
        if not isinstance(raw, Mapping):
            return VALUE, {}
        if tag is not None:
            return self._typed(raw, tag, path)
        return "mapping", {key: self.node(item, path, f".{key}") for key, item in raw.items()}

    def _typed(self, raw: Mapping[str, Json], tag: str, path: str) -> tuple[str, dict[str, Node]]:
        items, facts = raw.get("items"), raw.get("facts")
        if tag == "same":
            return tag, {}
        if tag == "object" and isinstance(facts, Mapping):
            inner = {f"fact {key}": self.node(one, path, f":{key}") for key, one in facts.items()}
            if "state" in raw:
                inner["state"] = self.node(raw["state"], path, "")
            return tag, {**_described(raw, "facts", "state"), **inner}
        tensors = raw.get("parts")
        if tag == "subclass" and isinstance(tensors, Mapping):
            pairs = tensors.items()
            inner = {f"part {name}": self.node(one, path, f".{name}") for name, one in pairs}
            inner["context"] = self.node(raw.get("context"), path, ":context")
            return tag, {**_described(raw, "parts", "context"), **inner}
        if tag in _IN_LEAVES and isinstance(raw.get("leaf"), str):
            return tag, _described(raw)
        if tag in _WITH_NODES:
            names = [name for name in _WITH_NODES[tag] if name in raw]
            inner = {name: self.node(raw[name], path, f".{name}") for name in names}
            return tag, {**_described(raw, *names), **inner}
        if tag in _ELEMENTS and isinstance(items, list):
            return tag, {**_described(raw, "items"), **self._elements(items, path)}
        if tag in _PAIRS and isinstance(items, list) and _are_pairs(items):
            return tag, {**_described(raw, "items"), **self._pairs(items, path)}
        return VALUE, {}

    def _elements(self, items: Iterable[Json], path: str) -> dict[str, Node]:
        return {str(i): self.node(item, path, f".{i}") for i, item in enumerate(items)}

    def _pairs(self, items: Iterable[Sequence[Json]], path: str) -> dict[str, Node]:
        return {
            json.dumps(key): self.node(value, path, f".{_key_text(key)}") for key, value in items
        }

    def _path_of(self, number: Json) -> Json:
        if not isinstance(number, int) or isinstance(number, bool):
            return number
        return self._seen[number] if 0 <= number < len(self._seen) else number


def _check_depth(depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise MalformedError(f"is nested deeper than {_MAX_DEPTH} levels")


def _described(raw: Mapping[str, Json], *without: str) -> dict[str, Node]:
    """Return what a typed value is besides its elements: a class, a length, a dtype."""
    return {
        f"field {key}": Node(VALUE, value, end=f":{key}")
        for key, value in raw.items()
        if key != TAG and key not in without
    }


def _are_pairs(items: Sequence[Json]) -> bool:
    """Tell whether these are keys with values, and no key occurs twice."""
    pairs = [item for item in items if isinstance(item, list) and len(item) == 2]
    return len({json.dumps(key) for key, _ in pairs}) == len(items)


def _key_text(key: Json) -> str:
    """Return a key as the paths of leaves spell it."""
    if isinstance(key, str):
        return key
    return f"<{key.get(TAG)}>" if isinstance(key, Mapping) else repr(key)
