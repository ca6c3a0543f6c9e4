"""What `unbroken diff` prints for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from unbroken.cli.sides import CheckpointSide, ConfigSide, Side
from unbroken.cli.tables import date_text, make_table, print_table, size_text, value_text
from unbroken.cli.typed_text import texts_of
from unbroken.store import Diff, TensorDifference, TensorEntry, ValueDifference, ValueGroup

if TYPE_CHECKING:
    from unbroken.capture.values import Distance

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

    Args:
        console: Where to.
        sides: What was compared.
        diff: What differs.
        distances: How far apart the tensors are, by path, where that was asked for.
        show_all: Show every row of long tables, and what is the same.
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
    rest = sorted((one for one in tensors if one.path not in distances), key=_place)
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


def _place(difference: TensorDifference) -> int:
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
        "max abs": _number(distance.max_abs),
        "max rel": _number(distance.max_rel),
        "max ULP": _number(distance.max_ulp),
        "NaN in A": str(distance.nan_a),
        "NaN in B": str(distance.nan_b),
        "first": str(distance.first),
    }


def _number(value: float | None) -> str:
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
