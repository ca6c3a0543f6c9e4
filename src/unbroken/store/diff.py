"""What differs between two checkpoints, by their manifests and their small files alone.

Tensors are compared by type, shape and digest: none is read. What it says is as true as the
manifests; that the bytes match them is what `verify` shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard

from unbroken.errors import CorruptCheckpointError
from unbroken.store.canonical import Json, MalformedError, from_strict
from unbroken.store.manifest import Manifest
from unbroken.store.reader import CheckpointReader
from unbroken.store.shards import TensorEntry
from unbroken.store.value_diff import ValueDifference, ValueGroup, diff_trees
from unbroken.store.value_tree import Node, plain_tree, state_tree

STATE_FILE = "state.json"
NOT_COUNTED: Mapping[str, frozenset[str]] = {
    "config": frozenset({"config.output_dir"}),
    "other facts": frozenset({"metrics_bytes"}),
    "state": frozenset({"statistics.logged_seconds", "statistics.seconds"}),
}
"""By group: where a run is, and how long it took. No two runs agree on it; no bit depends on it."""


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same on both sides.

    Attributes:
        path: Its path in the training state.
        kind: "only in a"; "only in b"; "type": another dtype or shape; "bytes": another digest;
            "shards": cut in another way, so that digests cannot tell whether its bytes differ.
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
    manifests tell the truth. Facts are compared as numbers (1 is 1.0), the state exactly (1 is
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
    state, passed = _counted(_without_told(_diff_state(a, b, tensors), facts))
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
    """Compare what is not a tensor in the state; what `tensors` tell is not told twice."""
    told = frozenset(difference.path for difference in tensors if difference.kind != "bytes")
    one = _state_of(a)
    other = one if _digests(a, STATE_FILE) == _digests(b, STATE_FILE) else _state_of(b)
    return diff_trees("state", one, other, exact=True, told=told)


def _without_told(state: ValueGroup, facts: Diff) -> ValueGroup:
    """Leave out of the state what stands in the facts too: the progress of a Trainer."""
    told = [
        replace(one, path=f"values.{one.path}")
        for group in facts.groups
        for one in group.differences
    ]
    rest = tuple(one for one in state.differences if one not in told)
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
