"""What differs between two checkpoints, by their manifests and their small files alone.

Tensors are compared by type, shape and digest: none is read. What it says is as true as the
manifests; that the bytes match them is what `verify` shows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeGuard

from unbroken.errors import CorruptCheckpointError
from unbroken.store.checkpoint.reader import CheckpointReader
from unbroken.store.format.canonical_json import Json, MalformedError, from_strict
from unbroken.store.format.manifest import Manifest, TensorEntry
from unbroken.store.format.names import STATE_FILE
from unbroken.store.format.typed_json import TAG, TAGS, InnerValue, Tag, elements_of

# JSON as a tree of values with paths. Facts of a manifest are plain JSON, `state.json` is typed
# JSON; both become the same kind of tree. What `TAGS` does not take apart is compared as a whole.

VALUE, MAPPING, LIST = "value", "mapping", "list"

_MAX_DEPTH = 70  # a state tree has at most 66 levels, facts have at most 64
_KINDS: Mapping[str, Tag] = {
    **TAGS,
    VALUE: Tag(),
    MAPPING: Tag(is_counted=True, has_order=True),
    LIST: Tag(is_counted=True, has_length=True),
}


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
        return str(self.parts["field leaf"].raw) if _KINDS[self.kind].is_leaf else None

    def below(self, path: str) -> str:
        """Return its own path, from that of its group."""
        return (path + self.end).removeprefix(".")

    def ends(self) -> Iterator[Node]:
        """Yield what is no group: the plain values, and what has its bytes in a leaf."""
        if self.kind == VALUE or self.leaf is not None:
            yield self
        else:
            for part in self.parts.values():
                yield from part.ends()


def plain_tree(value: Json) -> Node:
    """Return plain JSON as a tree; raises `MalformedError` where it is nested absurdly deep.

    Example:
        >>> plain_tree({"model": {"n_layer": 2}}).parts["model"].parts["n_layer"]
        Node(kind='value', raw=2, parts={}, end='.n_layer')
    """
    return _Tree(is_typed=False).node(value, "", "")


def state_tree(structure: Json) -> Node:
    """Return the typed JSON of a state as a tree; the paths are those of the state's leaves.

    A reference to an object that occurred before is the path of that object, not its number:
    a value that was put in before both does not change it.

    Raises:
        MalformedError: It is nested absurdly deep.

    Example:
        >>> tree = state_tree({"betas": {"$": "tuple", "items": [0.9, 0.95]}})
        >>> tree.parts["betas"].kind, [node.raw for node in tree.ends()]
        ('tuple', [0.9, 0.95])
    """
    return _Tree(is_typed=True).node(structure, "", "")


class _Tree:
    """Goes through JSON in the order of its encoder, and counts what may occur twice."""

    def __init__(self, *, is_typed: bool) -> None:
        self._is_typed = is_typed
        self._paths: list[str] = []  # of what was counted, by its number
        self._times: Counter[str] = Counter()

    def node(self, raw: Json, path: str, end: str, depth: int = 0) -> Node:
        """Return a value of any kind."""
        if depth > _MAX_DEPTH:
            raise MalformedError(f"is nested deeper than {_MAX_DEPTH} levels")
        path = (path + end).removeprefix(".")
        tag = raw.get(TAG) if self._is_typed and isinstance(raw, Mapping) else None
        if tag == "same" and isinstance(raw, Mapping):
            return Node(VALUE, {**raw, "as": self._path_of(raw.get("as"))}, end=end)
        kind = _kind_of_value(raw, tag)
        if _KINDS[kind].is_counted:
            self._times[path] += 1  # {1: [], "1": []} has one path for two lists
            self._paths.append(f"{path}~{self._times[path]}" if self._times[path] > 1 else path)
        children = _children(raw, kind)
        if children is None:
            return Node(VALUE, raw, end=end)
        parts = {one.key: self.node(one.node, path, one.end, depth + 1) for one in children}
        return Node(kind, raw, {**_described(raw, kind), **parts}, end)

    def _path_of(self, number: Json) -> Json:
        if not isinstance(number, int) or isinstance(number, bool):
            return number
        return self._paths[number] if 0 <= number < len(self._paths) else number


def _kind_of_value(raw: Json, tag: Json) -> str:
    if isinstance(raw, list | tuple):
        return LIST
    if tag is None:
        return MAPPING if isinstance(raw, Mapping) else VALUE
    return tag if isinstance(tag, str) and tag in TAGS else VALUE


def _children(raw: Json, kind: str) -> list[InnerValue] | None:
    """Return the values inside of one; None for one that is compared as a whole."""
    if isinstance(raw, list | tuple):
        return elements_of(raw)
    if not isinstance(raw, Mapping):
        return None
    if kind == MAPPING:
        return [InnerValue(key, f".{key}", item) for key, item in raw.items()]
    if _KINDS[kind].is_leaf:
        return [] if isinstance(raw.get("leaf"), str) else None
    children = _KINDS[kind].children
    return None if children is None else children(raw)


def _described(raw: Json, kind: str) -> dict[str, Node]:
    """Return what a typed value is besides its elements: a class, a length, a dtype."""
    if kind not in TAGS or not isinstance(raw, Mapping):
        return {}
    without = (TAG, *TAGS[kind].nested)
    fields = {key: value for key, value in raw.items() if key not in without}
    return {f"field {key}": Node(VALUE, value, end=f":{key}") for key, value in fields.items()}


# Comparing two trees of values, path by path.


@dataclass(frozen=True)
class ValueDifference:
    """A value that is not the same on both sides.

    Attributes:
        path: Its path: "config.learning_rate", "scheduler.last_epoch".
        kind: "changed"; "only in a"; "only in b"; "order": the same keys in another order.
        a: The value of the first side; None where it has none.
        b: The value of the second side; None where it has none.
    """

    path: str
    kind: Literal["changed", "only in a", "only in b", "order"]
    a: Json
    b: Json


@dataclass(frozen=True)
class ValueGroup:
    """Values of one kind, compared: "config", "environment", "state", "files", ...

    Attributes:
        name: The kind.
        count: How many values there are in it, on the side that has more.
        differences: Those that differ.
        trees: Both sides whole, where they are JSON.
    """

    name: str
    count: int
    differences: tuple[ValueDifference, ...]
    trees: tuple[Node, Node] | None = field(default=None, repr=False, compare=False)

    def same(self) -> dict[str, Json]:
        """Return the values that are the same on both sides, by their paths.

        Example:
            >>> from unbroken.store.diff import plain_tree
            >>> a, b = plain_tree({"lr": 1, "seed": 1}), plain_tree({"lr": 2, "seed": 1})
            >>> diff_trees("", a, b, exact=False).same()
            {'seed': 1}
        """
        return {} if self.trees is None else dict(_same(*self.trees, ""))


def diff_trees(
    name: str, a: Node, b: Node, *, exact: bool, reported: frozenset[str] = frozenset()
) -> ValueGroup:
    """Compare two trees.

    Args:
        name: The name of the group that they are.
        a: The first tree.
        b: The second tree.
        exact: Whether the type of a number, the sign of zero and the order of keys are part of a
            value; otherwise 1 is 1.0.
        reported: Leaves that the manifests already report: one side lacks them, or has another
            type: nothing is said of them here.

    Example:
        >>> from unbroken.store.diff import plain_tree
        >>> a, b = plain_tree({"lr": 1, "seed": 1}), plain_tree({"lr": 1.0, "seed": 2})
        >>> [one.path for one in diff_trees("config", a, b, exact=False).differences]
        ['seed']
    """
    count = max(sum(end.leaf is None for end in node.ends()) for node in (a, b))
    found = () if a is b else tuple(_Comparison(exact, reported).differences(a, b, ""))
    return ValueGroup(name, count, found, (a, b))


def _same(a: Node, b: Node, path: str) -> Iterator[tuple[str, Json]]:
    """Yield the values that are the same at the same path; those with leaves are tensors."""
    path = a.below(path)
    if a.leaf is not None or a.kind != b.kind:
        return
    if a.kind == VALUE and json.dumps(a.raw) == json.dumps(b.raw):
        yield path, a.raw
    for key in a.parts.keys() & b.parts.keys():
        yield from _same(a.parts[key], b.parts[key], path)


@dataclass(frozen=True)
class _Comparison:
    """Compares two trees, as `diff_trees` says."""

    exact: bool
    reported: frozenset[str]

    def differences(self, a: Node, b: Node, path: str) -> Iterator[ValueDifference]:
        """Yield what differs between two nodes at the same path."""
        path, kind = a.below(path), _KINDS[a.kind]
        as_a_whole = a.kind != b.kind or a.kind == VALUE
        if as_a_whole or (kind.has_length and len(a.parts) != len(b.parts)):
            if not self._is_same(a.raw, b.raw):
                yield ValueDifference(path, "changed", a.raw, b.raw)
        elif a.leaf is None or a.leaf not in self.reported:
            yield from self._inside(a, b, path)

    def _inside(self, a: Node, b: Node, path: str) -> Iterator[ValueDifference]:
        for key, one in a.parts.items():
            if key in b.parts:
                yield from self.differences(one, b.parts[key], path)
            elif not self._is_reported(one):
                yield ValueDifference(one.below(path), "only in a", one.raw, None)
        for key, other in b.parts.items():
            if key not in a.parts and not self._is_reported(other):
                yield ValueDifference(other.below(path), "only in b", None, other.raw)
        keys, others = [*a.parts], [*b.parts]
        is_moved = keys != others and sorted(keys) == sorted(others)
        if self.exact and _KINDS[a.kind].has_order and is_moved:
            yield ValueDifference(path, "order", keys, others)

    def _is_reported(self, node: Node) -> bool:
        """Return whether there is nothing in it but leaves that the manifests report."""
        ends = [end.leaf for end in node.ends()]
        return bool(ends) and all(leaf in self.reported for leaf in ends)

    def _is_same(self, a: Json, b: Json) -> bool:
        is_equal_number = _is_number(a) and _is_number(b) and a == b
        return (is_equal_number and not self.exact) or json.dumps(a) == json.dumps(b)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


NOT_COUNTED: Mapping[str, frozenset[str]] = {
    "config": frozenset({"config.output_dir"}),
    "other facts": frozenset({"metrics_bytes"}),
    "step_records": frozenset({"step_records.attempt", "step_records.counted"}),
    "state": frozenset({"statistics.logged_seconds", "statistics.seconds"}),
}
"""By group: where a run is, and how long it took. No two runs agree on it; no bit depends on it."""


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same on both sides.

    Attributes:
        path: Its path in the training state.
        kind: "only in a"; "only in b"; "type": another dtype or shape; "bytes": another digest;
            "shards": sharded in another way, so that digests cannot tell whether its bytes differ.
        a: What the manifest of the first side says of it.
        b: What the manifest of the second side says of it.

    Example:
        >>> TensorDifference("model.w", "only in a", None, None).b is None
        True
    """

    path: str
    kind: Literal["only in a", "only in b", "type", "bytes", "shards"]
    a: TensorEntry | None
    b: TensorEntry | None


@dataclass(frozen=True)
class Diff:
    """What differs between two sides.

    Attributes:
        groups: The values, in groups.
        tensors: The tensors that differ.
        tensor_count: How many tensors there are, on either side.
        not_counted: What differs between any two runs and says nothing: see `NOT_COUNTED`.

    Example:
        >>> diff_facts({"config": {"seed": 1}}, {"config": {"seed": 2}}).is_same
        False
    """

    groups: tuple[ValueGroup, ...]
    tensors: tuple[TensorDifference, ...] = ()
    tensor_count: int = 0
    not_counted: tuple[ValueDifference, ...] = ()

    @property
    def is_same(self) -> bool:
        """Whether nothing differs but what is not counted."""
        return not self.tensors and not any(group.differences for group in self.groups)


def diff_checkpoints(a: CheckpointReader, b: CheckpointReader) -> Diff:
    """Return all that differs between two checkpoints; no tensor is read.

    Whatever one byte of the tensors and the files without tensors changes is found, as far as the
    manifests are true. Facts are compared as numbers (1 is 1.0), the state exactly (1 is
    not 1.0, 0.0 is not -0.0, and dicts have an order).

    Raises:
        CorruptCheckpointError: A file that has to be read is damaged.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointWriter
        >>> storage = MemoryStorage()
        >>> for step in (5, 10):
        ...     writer = CheckpointWriter(storage, step=step, run_id="a" * 32)
        ...     manifest = writer.commit({"progress": {"step": step}})
        >>> one, other = (CheckpointReader(storage, f"checkpoint-{step}") for step in (5, 10))
        >>> [group.differences[0].path for group in diff_checkpoints(one, other).groups]
        ['progress.step']
    """
    facts = diff_facts(a.manifest.facts, b.manifest.facts)
    tensors = diff_tensors(a.manifest, b.manifest)
    state, passed = _counted(_without_reported(_diff_state(a, b, tensors), facts))
    groups = (*facts.groups, state, *_diff_files(a, b))
    return Diff(
        tuple(group for group in groups if group.count or group.differences),
        tensors,
        len({**a.manifest.tensors, **b.manifest.tensors}),
        (*facts.not_counted, *passed),
    )


def diff_facts(a: Mapping[str, Json], b: Mapping[str, Json]) -> Diff:
    """Return what differs between the facts of two manifests, group by group, path by path.

    Args:
        a: The facts of the first side. Each mapping in them is a group; what stands directly in
            them is the group "other facts".
        b: Those of the second side.

    Example:
        >>> a, b = {"config": {"lr": 1, "seed": 1}}, {"config": {"lr": 1.0, "seed": 2}}
        >>> diff_facts(a, b).groups[0].differences
        (ValueDifference(path='config.seed', kind='changed', a=1, b=2),)
    """
    named = sorted({name for facts in (a, b) for name in facts if _is_group(facts, name)})
    loose = {*a, *b}.difference(named)
    found = [
        _counted(_diff_plain(name, _picked(a, names), _picked(b, names)))
        for name, names in [*((name, {name}) for name in named), ("other facts", loose)]
    ]
    passed = tuple(one for _, differences in found for one in differences)
    groups = tuple(group for group, _ in found if group.count or group.differences)
    return Diff(groups, not_counted=passed)


def _diff_plain(name: str, a: Json, b: Json) -> ValueGroup:
    return diff_trees(name, plain_tree(a), plain_tree(b), exact=False)


def diff_tensors(a: Manifest, b: Manifest) -> tuple[TensorDifference, ...]:
    """Return the tensors that differ, in the order of the first manifest, then of the second.

    Example:
        >>> one, other = (Manifest(5, run * 32, "", (), {}) for run in "ab")
        >>> diff_tensors(one, other)
        ()
    """
    ours, theirs = a.tensors, b.tensors
    pairs = {path: (ours.get(path), theirs.get(path)) for path in {**ours, **theirs}}
    kinds = {path: _kind_of(*pair) for path, pair in pairs.items()}
    return tuple(TensorDifference(path, kind, *pairs[path]) for path, kind in kinds.items() if kind)


def tensor_types(reader: CheckpointReader) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the tensors as PyTorch has them, by the path of their leaf.

    The manifest has another type where safetensors has no name for that of PyTorch: "U8".

    Raises:
        CorruptCheckpointError: The state is damaged.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointWriter
        >>> storage = MemoryStorage()
        >>> writer = CheckpointWriter(storage, step=5, run_id="a" * 32)
        >>> tensor = b'{"w":{"$":"tensor","leaf":"w","dtype":"complex128","shape":[3]}}'
        >>> writer.write_file("state.json", tensor)
        >>> manifest = writer.commit({})
        >>> tensor_types(CheckpointReader(storage, "checkpoint-5"))
        {'w': ('complex128', (3,))}
    """
    found = {}
    for end in _state_of(reader).ends():
        layout = _base_of(end) if end.kind == "tensor" else {}
        dtype, shape = layout.get("dtype"), layout.get("shape")
        if end.leaf is not None and isinstance(dtype, str) and _is_shape(shape):
            found[end.leaf] = (dtype, tuple(shape))
    return found


def _is_shape(value: Json) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _base_of(tensor: Node) -> Mapping[str, Json]:
    """Return the layout in which a tensor's leaf is stored: its own, or its memory's."""
    raw = tensor.raw if isinstance(tensor.raw, Mapping) else {}
    base = raw.get("base", raw)
    return base if isinstance(base, Mapping) else {}


def _kind_of(
    a: TensorEntry | None, b: TensorEntry | None
) -> Literal["only in a", "only in b", "type", "bytes", "shards"] | None:
    if a is None or b is None:
        return "only in b" if a is None else "only in a"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return "type"
    if a.boxes != b.boxes:
        return "shards"
    return "bytes" if a.digest != b.digest else None


def _picked(facts: Mapping[str, Json], names: set[str]) -> dict[str, Json]:
    return {name: value for name, value in facts.items() if name in names}


def _is_group(facts: Mapping[str, Json], name: str) -> bool:
    return isinstance(facts.get(name), Mapping)


def _diff_state(
    a: CheckpointReader, b: CheckpointReader, tensors: tuple[TensorDifference, ...]
) -> ValueGroup:
    """Compare what is not a tensor in the state; what `tensors` report is not reported twice."""
    reported = frozenset(difference.path for difference in tensors if difference.kind != "bytes")
    one = _state_of(a)
    other = one if _digests(a, STATE_FILE) == _digests(b, STATE_FILE) else _state_of(b)
    return diff_trees("state", one, other, exact=True, reported=reported)


def _without_reported(state: ValueGroup, facts: Diff) -> ValueGroup:
    """Leave out of the state what stands in the facts too: the progress of a Trainer."""
    reported = [
        replace(one, path=f"values.{one.path}")
        for group in facts.groups
        for one in group.differences
    ]
    rest = tuple(one for one in state.differences if one not in reported)
    return replace(state, differences=rest)


def _state_of(reader: CheckpointReader) -> Node:
    """Return the state's tree; an empty one where a checkpoint has no such file."""
    if _digests(reader, STATE_FILE) is None:
        return state_tree({})
    try:
        return state_tree(_json_in(reader, STATE_FILE))
    except MalformedError as error:
        where = f"{reader.folder}: {STATE_FILE}"
        raise CorruptCheckpointError(where, error.what, found=error.found) from None


def _digests(reader: CheckpointReader, name: str) -> list[str] | None:
    """Return the digests of a file; None if there is no such file."""
    files = {file.name: file for file in reader.manifest.files}
    return [region.digest for region in files[name].regions] if name in files else None


def _diff_files(a: CheckpointReader, b: CheckpointReader) -> list[ValueGroup]:
    """Compare the other files that hold no tensor; what is JSON value by value."""
    one, other = _plain_files(a), _plain_files(b)
    found: list[ValueDifference] = []
    groups = []
    for name in sorted({*one, *other}):
        if name not in one or name not in other:
            kind: Literal["only in a", "only in b"] = "only in a" if name in one else "only in b"
            found.append(ValueDifference(name, kind, one.get(name), other.get(name)))
        elif one[name] != other[name]:
            group = _diff_json_file(a, b, name)
            if group is None:
                found.append(ValueDifference(name, "changed", one[name], other[name]))
            else:
                groups.append(group)
    rest = len({*one, *other}) - len(groups)
    return [*groups, ValueGroup("files", rest, tuple(found))]


def _plain_files(reader: CheckpointReader) -> dict[str, Json]:
    """Return what the manifest says of each file without tensors, but not of the state."""
    return {
        file.name: {"nbytes": file.nbytes, "digests": [region.digest for region in file.regions]}
        for file in reader.manifest.files
        if not file.has_tensors and file.name != STATE_FILE
    }


def _diff_json_file(a: CheckpointReader, b: CheckpointReader, name: str) -> ValueGroup | None:
    """Compare the values in a file; None where it is no JSON, or only spelled differently."""
    if not name.endswith(".json"):
        return None
    try:
        group = _diff_plain(name, *(_json_in(reader, name) for reader in (a, b)))
    except MalformedError:
        return None
    return group if group.differences else None


def _json_in(reader: CheckpointReader, name: str) -> Json:
    return from_strict(reader.read_file(name))


def _counted(group: ValueGroup) -> tuple[ValueGroup, tuple[ValueDifference, ...]]:
    """Take the differences that are not counted out of a group."""
    names = NOT_COUNTED.get(group.name, ())
    passed = tuple(one for one in group.differences if one.path in names)
    rest = tuple(one for one in group.differences if one not in passed)
    return replace(group, differences=rest), passed
