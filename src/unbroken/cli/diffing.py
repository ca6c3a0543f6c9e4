"""`unbroken diff`: what differs between two checkpoints, runs or configuration files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from unbroken.cli.diff_page import print_page
from unbroken.cli.sides import (
    CheckpointSide,
    ConfigSide,
    Side,
    open_side,
    settings_named,
    settings_of,
)
from unbroken.cli.tables import make_console, print_json
from unbroken.errors import ConfigError
from unbroken.store import (
    Diff,
    Json,
    TensorDifference,
    TensorEntry,
    ValueDifference,
    diff_checkpoints,
    diff_facts,
    tensor_types,
)

if TYPE_CHECKING:
    from unbroken.capture.values import Distance

DIFFERENT = 1


def print_diff(a: str, b: str, *, with_values: bool, show_all: bool, as_json: bool) -> int:
    """Print what differs between two paths; return 0 if nothing does, and 1 if something does.

    Args:
        a: A checkpoint, a run (its newest checkpoint that can be opened), or a configuration file.
        b: Another one.
        with_values: Read the tensors of which the bytes differ, and tell how far they are apart.
        show_all: Show every row of long tables, and what is the same.
        as_json: Print JSON instead of tables.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
        ConfigError: A configuration file cannot be read, or has no tensors to read.
        RunDirectoryError: A path names nothing that can be compared.
    """
    one, other = open_side(a), open_side(b)
    diff = compare(one, other)
    distances = distances_of(one, other, diff) if with_values else {}
    diff, distances = without_equal(diff, distances)
    if as_json:
        print_json(_as_json(one, other, diff, distances, with_same=show_all))
    else:
        print_page(make_console(), (one, other), diff, distances, show_all=show_all)
    return 0 if diff.is_same else DIFFERENT


def compare(a: Side, b: Side) -> Diff:
    """Compare two sides; of a checkpoint and a file, the settings that the file names.

    Raises:
        CorruptCheckpointError: A checkpoint is damaged.
    """
    if isinstance(a, CheckpointSide) and isinstance(b, CheckpointSide):
        return diff_checkpoints(a.reader, b.reader)
    return diff_facts(_settings(a, b), _settings(b, a))


def _settings(side: Side, other: Side) -> dict[str, Json]:
    if isinstance(side, ConfigSide):
        return settings_of(side.config)
    named = other.config if isinstance(other, ConfigSide) else {}
    return settings_named(side.reader.manifest.facts, named)


def distances_of(a: Side, b: Side, diff: Diff) -> dict[str, Distance]:
    """Read the tensors of which only the bytes differ, or may, one after the other.

    Raises:
        ConfigError: A side is no checkpoint.
        CorruptCheckpointError: The bytes of a tensor are not those of its manifest.
    """
    if isinstance(a, ConfigSide) or isinstance(b, ConfigSide):
        raise ConfigError("--values", expected="two checkpoints", found="a configuration file")
    paths = [one.path for one in diff.tensors if one.kind in ("bytes", "shards")]
    if not paths:
        return {}
    from unbroken.capture.values import stored_distance  # torch is needed here, and only here

    types, others = (tensor_types(side.reader) for side in (a, b))
    known = {path: kind for path, kind in types.items() if others.get(path) == kind}
    return {path: stored_distance(path, a.reader, b.reader, known.get(path)) for path in paths}


def without_equal(
    diff: Diff, distances: Mapping[str, Distance]
) -> tuple[Diff, dict[str, Distance]]:
    """Take out the tensors that are cut in another way, and turned out to be the same."""
    same = {path for path, distance in distances.items() if distance.differing == 0}
    rest = tuple(one for one in diff.tensors if one.path not in same)
    return replace(diff, tensors=rest), {p: d for p, d in distances.items() if p not in same}


def _as_json(
    a: Side, b: Side, diff: Diff, distances: Mapping[str, Distance], *, with_same: bool
) -> dict[str, object]:
    return {
        "same": diff.is_same,
        "a": _side_json(a),
        "b": _side_json(b),
        "groups": [
            {
                "name": group.name,
                "values": group.count,
                "differences": _values(group.differences),
                **({"same": group.same()} if with_same else {}),
            }
            for group in diff.groups
        ],
        "tensors": {
            "count": diff.tensor_count,
            "differences": [_tensor_json(one, distances.get(one.path)) for one in diff.tensors],
        },
        "not_counted": _values(diff.not_counted),
    }


def _side_json(side: Side) -> dict[str, object]:
    if isinstance(side, ConfigSide):
        return {"path": side.path, "kind": "config"}
    manifest = side.reader.manifest
    return {
        "path": side.path,
        "kind": "checkpoint",
        "folder": side.reader.folder,
        "is_newest": side.is_newest,
        "skipped": dict(side.skipped),
        "step": manifest.step,
        "created": manifest.created,
        "run_id": manifest.run_id,
        "state_digest": manifest.state_digest,
    }


def _values(differences: Iterable[ValueDifference]) -> list[dict[str, object]]:
    """Return the differences; a side that has no such value has no key, where null is a value."""
    missing = {"only in a": "b", "only in b": "a"}
    return [
        {key: value for key, value in asdict(one).items() if key != missing.get(one.kind)}
        for one in differences
    ]


def _tensor_json(difference: TensorDifference, distance: Distance | None) -> dict[str, object]:
    sides = {"a": difference.a, "b": difference.b}
    found = {key: _entry_json(entry) for key, entry in sides.items() if entry is not None}
    values = {} if distance is None else {"values": _finite(asdict(distance))}
    return {"path": difference.path, "kind": difference.kind, **found, **values}


def _entry_json(entry: TensorEntry) -> dict[str, object]:
    cut = {} if entry.is_whole else {"shards": len(entry.shards)}
    return {"dtype": entry.dtype, "shape": entry.shape, "digest": entry.digest, **cut}


def _finite(values: Mapping[str, object]) -> dict[str, object]:
    """Spell infinity as the journals do, since JSON has none."""
    return {
        name: "Infinity" if isinstance(value, float) and math.isinf(value) else value
        for name, value in values.items()
    }
