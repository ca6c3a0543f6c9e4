"""`unbroken diff`: what differs between two checkpoints, runs or configuration files."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from unbroken.cli.run_paths import open_run_path
from unbroken.cli.tables import (
    date_text,
    make_console,
    make_table,
    print_json,
    print_table,
    size_text,
    value_text,
)
from unbroken.config_file import read_mapping
from unbroken.errors import (
    CheckpointNotFoundError,
    ConfigError,
)
from unbroken.store import (
    CheckpointReader,
    Diff,
    Json,
    TensorDifference,
    TensorEntry,
    ValueDifference,
    ValueGroup,
    diff_checkpoints,
    diff_facts,
    tensor_types,
)
from unbroken.store.format.typed_json import TAG

if TYPE_CHECKING:
    from unbroken.capture.tensor_distance import Distance


# What can be compared: a checkpoint, the newest one of a run, or a configuration file.


_SUFFIXES = (".yaml", ".yml", ".json")
_GROUPS_IN_A_FILE = ("model", "data")  # all else in a configuration file is flat


@dataclass(frozen=True)
class CheckpointSide:
    """A checkpoint: the one that the user's path names, or the newest of the run that it names.

    `skipped` are newer checkpoints of that run that cannot be opened, and why.
    """

    path: str
    reader: CheckpointReader
    is_newest: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ConfigSide:
    """A configuration file, and what stands in it."""

    path: str
    config: Mapping[str, Json]


Side = CheckpointSide | ConfigSide


def open_side(text: str) -> Side:
    """Return what a path names.

    Raises:
        CheckpointError: It names a checkpoint that cannot be opened, or a run that has none.
        ConfigError: It names a configuration file that cannot be read, or says nothing.
        RunDirectoryError: It names nothing, or something else.
    """
    path = Path(text)
    if path.suffix in _SUFFIXES and not path.is_dir():
        return ConfigSide(text, _read_config(path))
    named = open_run_path(text)
    if named.folder is not None:
        return CheckpointSide(text, named.open(named.folder))
    newest, rejected = (None, ()) if named.run is None else named.run.catalog.newest_that_opens()
    skipped = {one.folder: one.reason.removeprefix(f"{one.folder}: ") for one in rejected}
    if newest is None:
        what = "no checkpoint can be opened" if skipped else "there is no checkpoint yet"
        hint = "\n".join(f"{folder}: {reason}" for folder, reason in skipped.items()) or None
        raise CheckpointNotFoundError(text, what, hint=hint)
    return CheckpointSide(text, newest, is_newest=True, skipped=skipped)


def _read_config(path: Path) -> dict[str, Json]:
    """Return the file's content as JSON has it; a date is its text."""
    values = read_mapping(path)
    if not values:
        raise ConfigError(str(path), "names no setting")
    try:
        text = json.dumps(values, default=str)
        plain: dict[str, Json] = json.loads(text, parse_constant=str)  # NaN as "NaN"
    except (TypeError, ValueError, RecursionError) as error:  # a key of a strange type, a cycle
        raise ConfigError(str(path), f"cannot be compared: {error}") from error
    return plain


def settings_of(config: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings of a configuration file as a manifest holds them.

    Example:
        >>> settings_of({"seed": 1, "model": {"n_layer": 2}})
        {'config': {'seed': 1}, 'settings': {'model': {'n_layer': 2}}}
    """
    nested = {name: config[name] for name in _GROUPS_IN_A_FILE if name in config}
    flat = {name: value for name, value in config.items() if name not in nested}
    return {"config": flat, "settings": nested}


def settings_named(facts: Mapping[str, Json], config: Mapping[str, Json]) -> dict[str, Json]:
    """Return those settings in the facts of a manifest that a configuration file names.

    One text in the file stands for a list of one, as the settings of the data take it.

    Example:
        >>> facts = {"config": {"seed": 1, "bf16": False}, "settings": {"data": {"train": ["a"]}}}
        >>> settings_named(facts, {"seed": 2, "data": {"train": "a"}})
        {'config': {'seed': 1}, 'settings': {'data': {'train': 'a'}}}
    """
    given = settings_of(config)
    stored = _as_mapping(facts.get("settings"))
    nested = {
        name: _named(_as_mapping(stored.get(name)), _as_mapping(values))
        for name, values in _as_mapping(given["settings"]).items()
    }
    flat = _named(_as_mapping(facts.get("config")), _as_mapping(given["config"]))
    return {"config": flat, "settings": nested}


def _named(stored: Mapping[str, Json], given: Mapping[str, Json]) -> dict[str, Json]:
    return {
        name: value if isinstance(value, str) and stored[name] == [value] else stored[name]
        for name, value in given.items()
        if name in stored
    }


def _as_mapping(value: Any) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


# Values of a state, which are typed JSON, as a person reads them.


_LONGEST = 60  # of a list or mapping that is written out
_WIDEST = 200  # characters of one value
_QUIET_NAN = "7ff8000000000000"
_NUMPY = {
    "<f2": "<e", "<f4": "<f", "<f8": "<d",
    "|i1": "<b", "<i2": "<h", "<i4": "<i", "<i8": "<q",
    "|u1": "<B", "<u2": "<H", "<u4": "<I", "<u8": "<Q",
    "|b1": "<?",
}  # fmt: skip
_BRACKETS = {"tuple": "()", "namedtuple": "()", "torch.Size": "()", "set": "{}", "frozenset": "{}"}


def texts_of(a: Json, b: Json) -> tuple[str, str]:
    """Return two values that differ as texts that differ; of long ones, the part where they do.

    Example:
        >>> texts_of("cosine", None), texts_of("1", 1)
        (('cosine', 'null'), ('"1"', '1'))
    """
    one, other = text_of(a), text_of(b)
    if one == other:
        one, other = json.dumps(a), json.dumps(b)
    pairs = enumerate(zip(one, other, strict=False))
    shared = next((i for i, (x, y) in pairs if x != y), min(len(one), len(other)))
    start = max(0, shared - 20)
    return _cut(one, start), _cut(other, start)


def _cut(text: str, start: int) -> str:
    """Return the part of a long text from `start` on."""
    if len(text) <= _WIDEST:
        return text
    part = text[start : start + _WIDEST]
    return ("" if start == 0 else "...") + part + ("..." if len(text) > start + _WIDEST else "")


def text_of(value: Json, *, quoted: bool = False) -> str:
    """Return JSON or typed JSON on one line; what JSON does not have, as Python writes it.

    Example:
        >>> text_of({"$": "tuple", "items": [0.9, {"$": "float", "bits": "7ff0000000000000"}]})
        '(0.9, inf)'
        >>> text_of(list(range(100)))
        'a list of 100'
    """
    if isinstance(value, str) and not quoted:
        return value
    if isinstance(value, Mapping):
        return _typed(value) if TAG in value else _mapping_text(value)
    if isinstance(value, list):
        return _listed(value, "[]", "list")
    return json.dumps(value, ensure_ascii=False)


def _typed(value: Mapping[str, Json]) -> str:
    """Return a typed value; as JSON where it is not what unbroken writes."""
    try:
        return _known(value, str(value[TAG]))
    except (AttributeError, KeyError, TypeError, ValueError, struct.error):
        return json.dumps(value, ensure_ascii=False)


def _known(value: Mapping[str, Json], tag: str) -> str:
    if tag in _BRACKETS:
        return _listed(_list(value["items"]), _BRACKETS[tag], tag)
    if tag in ("tensor", "numpy.ndarray"):
        return f"{tag.removeprefix('numpy.nd')} {value['dtype']}{value['shape']}"
    if tag in ("int", "float", "complex", "numpy.scalar"):
        return _number_text(value, tag)
    if tag == "object":
        return f"{value['kind']} {value['class']}"
    if tag == "same":
        return f"the same object as {value['as']}"
    if tag in ("bytes", "bytearray") and "hex" in value:
        return repr(bytes.fromhex(str(value["hex"])))
    if "name" in value:  # dtypes, devices, enums
        kind = f"{value['type']}." if "type" in value else ""
        return f"{kind}{value['name']}"
    return json.dumps(value, ensure_ascii=False)


def _number_text(value: Mapping[str, Json], tag: str) -> str:
    if tag == "int":
        return str(int(str(value["hex"]), 16))
    if tag == "numpy.scalar":
        raw = bytes.fromhex(str(value["hex"]))
        return f"numpy {value['dtype']} {struct.unpack(_NUMPY[str(value['dtype'])], raw)[0]}"
    bits = str(value["bits"])
    if tag == "complex":
        return str(complex(*struct.unpack(">dd", bytes.fromhex(bits))))
    number = struct.unpack(">d", bytes.fromhex(bits))[0]
    is_other_nan = math.isnan(number) and bits != _QUIET_NAN
    return f"nan with the bits {bits}" if is_other_nan else str(number)


def _listed(items: list[Json], brackets: str, kind: str) -> str:
    parts = ", ".join(text_of(item, quoted=True) for item in items[:_LONGEST])
    text = f"{brackets[0]}{parts}{brackets[1]}"
    return text if len(text) <= _LONGEST else f"a {kind} of {len(items)}"


def _mapping_text(value: Mapping[str, Json]) -> str:
    if len(value) > _LONGEST:
        return f"a mapping of {len(value)}"
    parts = ", ".join(f"{key}: {text_of(item, quoted=True)}" for key, item in value.items())
    return f"{{{parts}}}" if len(parts) <= _LONGEST else f"a mapping of {len(value)}"


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise TypeError(type(value).__name__)
    return value


# What `unbroken diff` prints for people.


_SHOWN = 15  # rows of a table, unless all are asked for
_KINDS = {
    "only in a": "only in A",
    "only in b": "only in B",
    "type": "of another dtype or shape",
    "bytes": "of other bytes",
    "shards": "cut in another way, so that digests cannot tell",
}


def print_page(
    console: Console,
    sides: tuple[Side, Side],
    diff: Diff,
    distances: Mapping[str, Distance],
    *,
    show_all: bool,
) -> None:
    """Print both sides, each group in which something differs, and what is the same.

    With `show_all`, every row of long tables is shown, and the values that are the same.
    """
    for name, side in zip("AB", sides, strict=True):
        _print_side(console, name, side)
    for group in diff.groups:
        _print_group(console, group, show_all=show_all)
    same = _same_tensors(diff, sides) if show_all else []
    if diff.tensors or same:
        many = _many_tensors(diff, distances)
        owners = f": {_by_owner(diff, sides)}" if diff.tensors else ""
        console.print(f"\ntensors: {many}{owners}", style="bold")
        _print_tensors(console, diff.tensors, distances, show_all=show_all)
        _print_rows(console, ("", ""), [(path, "same") for path in same], show_all=True)
        if any(one.kind == "bytes" and one.path not in distances for one in diff.tensors):
            console.print("how far apart: --values")
        if any(one.kind == "shards" and one.path not in distances for one in diff.tensors):
            console.print("whether those that are cut in another way differ: --values")
    summary = _summary(diff)
    if summary:
        console.print("", *summary, sep="\n")


def _print_side(console: Console, name: str, side: Side) -> None:
    if isinstance(side, ConfigSide):
        console.print(f"{name}  {side.path}: the settings that it names")
        return
    manifest = side.reader.manifest
    newest = f": {side.reader.folder}, the newest" if side.is_newest else ""
    console.print(f"{name}  {side.path}{newest}")
    console.print(
        f"   step {manifest.step}, saved {date_text(manifest.created)}, run {manifest.run_id[:8]}, "
        f"{size_text(manifest.nbytes)}"
    )
    for folder, reason in side.skipped.items():
        console.print(f"   not used: {folder}: {reason}")


def _print_group(console: Console, group: ValueGroup, *, show_all: bool) -> None:
    same = group.same() if show_all else {}
    if not group.differences and not same:
        return
    first = group.differences[0] if group.differences else None
    if first is not None and first.path == group.name:  # only one side has anything of the kind
        values = f"{group.count} value{'s'[: group.count != 1]}"
        console.print(f"\n{group.name}: {_only(first.kind)} ({values})", style="bold")
        return
    console.print(f"\n{group.name}: {_many(len(group.differences), group.count)}", style="bold")
    rows = [_value_cells(group.name, difference) for difference in group.differences]
    names = ((path.removeprefix(f"{group.name}."), path) for path in sorted(same))
    rows += [(name, value_text(same[path]), "same") for name, path in names]
    _print_rows(console, ("", "A", "B"), rows, show_all=show_all)


def _many(differing: int, count: int) -> str:
    return f"{differing} of {count} {'differs' if differing == 1 else 'differ'}"


def _many_tensors(diff: Diff, distances: Mapping[str, Distance]) -> str:
    """Return how many tensors differ, and how many may."""
    unknown = sum(one.kind == "shards" and one.path not in distances for one in diff.tensors)
    known = _many(len(diff.tensors) - unknown, diff.tensor_count)
    return f"{known}, {unknown} may" if unknown else known


def _only(kind: str) -> str:
    return f"only in {kind[-1].upper()}"


def _value_cells(group: str, difference: ValueDifference) -> tuple[str, str, str]:
    name = difference.path.removeprefix(f"{group}.")
    if difference.kind == "order":
        name += ": order of the keys"
    a, b = texts_of(difference.a, difference.b)
    kind = difference.kind
    return name, "-" if kind == "only in b" else a, "-" if kind == "only in a" else b


def _by_owner(diff: Diff, sides: tuple[Side, Side]) -> str:
    """Return how many tensors of the model, the optimizer, ... differ."""
    paths = {
        path
        for side in sides
        if isinstance(side, CheckpointSide)
        for path in side.reader.manifest.tensors
    }
    totals = Counter(map(_owner, paths))
    found = Counter(_owner(difference.path) for difference in diff.tensors)
    return ", ".join(f"{owner} {found[owner]} of {totals[owner]}" for owner in found)


def _same_tensors(diff: Diff, sides: tuple[Side, Side]) -> list[str]:
    found = [side.reader.manifest.tensors for side in sides if isinstance(side, CheckpointSide)]
    differing = {difference.path for difference in diff.tensors}
    if len(found) < len(sides):
        return []
    return [path for path in found[0] if path in found[1] and path not in differing]


def _owner(path: str) -> str:
    return path.partition(".")[0].partition(":")[0]


def _print_tensors(
    console: Console,
    tensors: Sequence[TensorDifference],
    distances: Mapping[str, Distance],
    *,
    show_all: bool,
) -> None:
    """Print the tensors; those whose elements were compared in a table of their own."""
    kinds: Counter[str] = Counter(one.kind for one in tensors)
    if len(kinds) > 1:
        console.print(", ".join(f"{kinds[kind]} {_KINDS[kind]}" for kind in _KINDS if kinds[kind]))
    rest = sorted((one for one in tensors if one.path not in distances), key=_rank_of_kind)
    cells = [(one.path, _tensor_text(one)) for one in rest]
    _print_rows(console, ("", ""), cells, show_all=show_all)
    if distances:
        console.print(*([""] if rest else []), "largest absolute difference first:", sep="\n")
        _print_distances(console, distances, show_all=show_all)


def _print_distances(
    console: Console, distances: Mapping[str, Distance], *, show_all: bool
) -> None:
    columns = ["", "differ", "max abs", "max rel", "max ULP", "first"]
    if any(one.nan_a or one.nan_b for one in distances.values()):
        columns[-1:-1] = ["NaN in A", "NaN in B"]
    far_first = sorted(distances, key=lambda path: _rank(distances[path]), reverse=True)
    cells = [{"": path, **_distance_cells(distances[path])} for path in far_first]
    rows = [[row[column] for column in columns] for row in cells]
    _print_rows(console, columns, rows, numbers=columns[1:-1], show_all=show_all)


def _rank_of_kind(difference: TensorDifference) -> int:
    return [*_KINDS].index(difference.kind)


def _tensor_text(difference: TensorDifference) -> str:
    a, b = _type_text(difference.a), _type_text(difference.b)
    if difference.kind == "bytes":
        return f"{a}: other bytes"
    if difference.kind == "shards":
        return f"{a}: {_cut_text(difference.a)} in A, {_cut_text(difference.b)} in B"
    return f"{a} in A, {b} in B" if a and b else f"{a or b} {_only(difference.kind)}"


def _type_text(tensor: TensorEntry | None) -> str | None:
    return None if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"


def _cut_text(tensor: TensorEntry | None) -> str:
    return "whole" if tensor is None or tensor.is_whole else f"{len(tensor.shards)} shards"


def _rank(distance: Distance) -> tuple[bool, int, float]:
    """Return what puts NaN before numbers, far before near, and random generators last."""
    is_floating = distance.max_ulp is not None
    return is_floating, distance.nan_a + distance.nan_b, distance.max_abs or 0.0


def _distance_cells(distance: Distance) -> dict[str, str]:
    is_all = distance.differing == distance.count
    return {
        "differ": "all" if is_all else f"{distance.differing} of {distance.count}",
        "max abs": _rounded(distance.max_abs),
        "max rel": _rounded(distance.max_rel),
        "max ULP": _rounded(distance.max_ulp),
        "NaN in A": str(distance.nan_a),
        "NaN in B": str(distance.nan_b),
        "first": str(distance.first),
    }


def _rounded(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) and value < 10**6 else f"{value:.3g}"


def _print_rows(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[str] = (),
    show_all: bool,
) -> None:
    """Print a table, and how many rows of it were left out."""
    if not rows:
        return
    shown = rows if show_all else rows[:_SHOWN]
    table = make_table(columns, shown, numbers)
    table.show_header = any(columns)
    for column in table.columns[1:]:
        column.no_wrap = column.header in numbers
    table.columns[0].no_wrap = max(len(row[0]) for row in shown) <= console.width // 2
    print_table(console, table)
    if len(shown) < len(rows):
        console.print(f"... and {len(rows) - len(shown)} more: --all")


def _summary(diff: Diff) -> list[str]:
    """Return what is the same, and what differs without saying anything."""
    parts = []
    if diff.tensor_count > len(diff.tensors):
        parts.append(f"{diff.tensor_count - len(diff.tensors)} tensors")
    same = {group.name: group.count for group in diff.groups if not group.differences}
    if "state" in same:
        parts.append(f"{same.pop('state')} values")
    lines = [f"the same: {', '.join([*parts, *same])}"] if parts or same else []
    if diff.not_counted:
        passed = ", ".join(one.path for one in diff.not_counted)
        lines.append(f"not counted: {passed}")
    return lines


DIFFERENT = 1


def print_diff(a: str, b: str, *, with_values: bool, show_all: bool, as_json: bool) -> int:
    """Print what differs between two paths; return 0 if nothing does, and 1 if something does.

    Args:
        a: A checkpoint, a run (its newest checkpoint that can be opened), or a configuration file.
        b: Another one.
        with_values: Read the tensors of which the bytes differ, and measure how far they are apart.
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
    from unbroken.capture.tensor_distance import (
        stored_distance,  # torch is needed here, and only here
    )

    types, others = (tensor_types(side.reader) for side in (a, b))
    known = {path: kind for path, kind in types.items() if others.get(path) == kind}
    return {path: stored_distance(path, a.reader, b.reader, known.get(path)) for path in paths}


def without_equal(
    diff: Diff, distances: Mapping[str, Distance]
) -> tuple[Diff, dict[str, Distance]]:
    """Take out the tensors that are sharded in another way, and turned out to be the same."""
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
    shards = {} if entry.is_whole else {"shards": len(entry.shards)}
    return {"dtype": entry.dtype, "shape": entry.shape, "digest": entry.digest, **shards}


def _finite(values: Mapping[str, object]) -> dict[str, object]:
    """Spell infinity as the journals do, since JSON has none."""
    return {
        name: "Infinity" if isinstance(value, float) and math.isinf(value) else value
        for name, value in values.items()
    }
