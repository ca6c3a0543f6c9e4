"""`unbroken ls`: which runs there are, and which checkpoints they have."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from unbroken.cli.run_paths import RunPath, best_step_of, is_pinned, is_run, open_run_path, runs_in
from unbroken.cli.tables import (
    date_text,
    make_console,
    make_table,
    print_json,
    print_table,
    size_text,
)
from unbroken.errors import CheckpointError, RunDirectoryError
from unbroken.store import Lineage, RunDirectory
from unbroken.store.format.names import BRANCHES, SET_ASIDE, step_of

# Which runs there are below a folder, and which is a branch of which.


@dataclass(frozen=True)
class Branching:
    """A run in the tree of branches.

    Attributes:
        run_path: The run.
        depth: How many of its forebears are in the tree.
        parent: The run that it left, if that is in the tree.
    """

    run_path: RunPath
    depth: int
    parent: RunPath | None

    @property
    def name(self) -> str:
        """How a list calls it: with the step at which it left its parent, if it is a branch."""
        run_path, lineage = self.run_path, lineage_of(self.run_path)
        if lineage is None:
            return short(run_path.path)
        if self.parent is None:
            return f"{short(run_path.path)} at step {lineage.step} of run {lineage.run_id[:8]}"
        is_inside = run_path.path.parent == self.parent.path / BRANCHES
        name = run_path.path.name if is_inside else short(run_path.path)
        return f"{'  ' * self.depth}{name} at step {lineage.step}"


def lineage_of(run_path: RunPath) -> Lineage | None:
    """Return where a run comes from, if it is a branch."""
    return None if run_path.run is None else run_path.run.parent


def origin_of(run_path: RunPath) -> str | None:
    """Return in words where a branch comes from; None for a run that is none."""
    lineage = lineage_of(run_path)
    if lineage is None:
        return None
    parent = _recorded(run_path, lineage)
    try:
        is_there = is_run(parent) and RunDirectory.open_readonly(parent).run_id == lineage.run_id
    except RunDirectoryError:
        is_there = False
    name = short(parent) if is_there else f"run {lineage.run_id}"
    return f"{name} at step {lineage.step}"


def runs_below(folder: Path) -> list[Path]:
    """Return the run directories at and below a folder, by path; no link is walked into."""
    found = [folder] if is_run(folder) else []
    for path, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not _holds_no_runs(name)]
        found += [Path(path, name) for name in folders if is_run(Path(path, name))]
    return sorted(found)


def _holds_no_runs(name: str) -> bool:
    return name.startswith(".") or name == SET_ASIDE or step_of(name) is not None


def as_tree(run_paths: Sequence[RunPath]) -> list[Branching]:
    """Return runs so that each stands below the one that it left, by the steps where they left.

    A parent is known by its id. Of several copies with that id, the one that stands where the
    branch says is taken.
    """
    parents = {run_path.path: _parent_in(run_path, run_paths) for run_path in run_paths}
    roots = [run_path for run_path in run_paths if parents[run_path.path] is None]
    tree = [item for root in roots for item in _with_branches(root, 0, None, run_paths, parents)]
    reached = {item.run_path.path for item in tree}
    lost = [
        run_path for run_path in run_paths if run_path.path not in reached
    ]  # files edited by hand
    return tree + [Branching(run_path, 0, None) for run_path in lost]


def _with_branches(
    run_path: RunPath,
    depth: int,
    parent: RunPath | None,
    run_paths: Sequence[RunPath],
    parents: dict[Path, RunPath | None],
) -> Iterator[Branching]:
    yield Branching(run_path, depth, parent)
    children = [one for one in run_paths if parents[one.path] is run_path]
    for child in sorted(children, key=_left_at):
        yield from _with_branches(child, depth + 1, run_path, run_paths, parents)


def _left_at(run_path: RunPath) -> tuple[int, Path]:
    lineage = lineage_of(run_path)
    return (0 if lineage is None else lineage.step, run_path.path)


def _parent_in(run_path: RunPath, run_paths: Sequence[RunPath]) -> RunPath | None:
    lineage = lineage_of(run_path)
    if lineage is None:
        return None
    known = [one for one in run_paths if one.run is not None and one.run.run_id == lineage.run_id]
    recorded = _recorded(run_path, lineage)
    return next((one for one in known if one.path == recorded), known[0] if known else None)


def _recorded(run_path: RunPath, lineage: Lineage) -> Path:
    return Path(os.path.normpath(run_path.path / lineage.path))


def short(path: Path) -> str:
    """Return the path as seen from the current directory, where it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


NOT_VERIFIED = "not verified"


@dataclass(frozen=True)
class Row:
    """One checkpoint of a list.

    Attributes:
        folder: Its folder in the run directory.
        state: "not verified" where the manifest is whole and all files have their sizes; else
            what is wrong. Only `unbroken verify` reads the bytes.
        step: Its step; None, as all that follows, if its manifest cannot be read.
        created: When it was saved, in UTC.
        nbytes: The size of all its files.
        tensors: How many tensors it has.
        best: Whether it is the best by the run's own metric.
        pinned: Whether the user pinned it.
    """

    folder: str
    state: str
    step: int | None = None
    created: str | None = None
    nbytes: int | None = None
    tensors: int | None = None
    best: bool = False
    pinned: bool = False

    @property
    def marks(self) -> str:
        """What is special about it, in words."""
        marks = {"best": self.best, "pinned": self.pinned}
        return ", ".join(mark for mark, is_set in marks.items() if is_set)


def print_listing(given: Sequence[str], *, as_json: bool) -> int:
    """Print the runs, or the checkpoints of the runs, that the paths name; and their branches.

    Raises:
        RunDirectoryError: A path names no run, and holds none.
    """
    run_paths = _run_paths(given)
    branches = _branches_below(run_paths)
    if as_json:
        tree = as_tree([*run_paths, *branches])
        print_json({"runs": [_run_json(item.run_path) for item in tree]})
    elif _is_overview(given, run_paths):
        _print_overview(as_tree(run_paths))
    else:
        _print_each(run_paths)
        if branches:
            tree = as_tree([*run_paths, *branches])
            _print_branches([item for item in tree if item.run_path in branches])
    return 0


def rows_of(run_path: RunPath) -> list[Row]:
    """Return the checkpoints of a run, by rising step."""
    best = best_step_of(run_path)
    return [_row(run_path, folder, best) for folder in run_path.folders]


def _row(run_path: RunPath, folder: str, best: int | None) -> Row:
    try:
        reader = run_path.open(folder)
    except CheckpointError as error:
        return Row(folder, str(error).removeprefix(f"{folder}: "))
    manifest = reader.manifest
    return Row(
        folder,
        NOT_VERIFIED,
        step=manifest.step,
        created=manifest.created,
        nbytes=manifest.nbytes,
        tensors=len(manifest.tensors),
        best=manifest.step == best,
        pinned=is_pinned(reader),
    )


def _run_paths(given: Sequence[str]) -> list[RunPath]:
    if given:
        return [run_path for text in given for run_path in _run_paths_at(text)]
    here = Path.cwd()
    found = [here] if is_run(here) else _runs_from(here)
    if not found:
        raise RunDirectoryError(
            str(here), "no run in ./runs or here", hint="name a run: unbroken ls RUN"
        )
    return [RunPath(path, RunDirectory.open_readonly(path)) for path in found]


def _run_paths_at(text: str) -> list[RunPath]:
    """Return the run or checkpoint that a path names, or else the runs in that folder."""
    inside = [] if is_run(Path(text)) else runs_below(Path(text).absolute())
    return [open_run_path(str(path)) for path in inside] or [open_run_path(text)]


def _runs_from(here: Path) -> list[Path]:
    """Return the runs below ./runs, those that stand here, and their branches."""
    found = runs_below(here / "runs")
    found += [path for run in runs_in(here) for path in runs_below(run)]
    return list(dict.fromkeys(found))


def _branches_below(run_paths: Sequence[RunPath]) -> list[RunPath]:
    """Return the runs that stand below the runs named, and are not named themselves."""
    named = {run_path.path for run_path in run_paths}
    found = [
        path
        for run_path in run_paths
        if run_path.folder is None
        for path in runs_below(run_path.path)
    ]
    others = [path for path in dict.fromkeys(found) if path not in named]
    return [RunPath(path, RunDirectory.open_readonly(path)) for path in others]


def _is_overview(given: Sequence[str], run_paths: Sequence[RunPath]) -> bool:
    """Return whether the paths name folders of runs, not runs: then one line a run is enough."""
    named = {Path(text).absolute() for text in given} or {Path.cwd()}
    return not any(run_path.path in named or run_path.folder is not None for run_path in run_paths)


def _run_json(run_path: RunPath) -> dict[str, object]:
    lineage = lineage_of(run_path)
    return {
        "path": str(run_path.path),
        "id": None if run_path.run is None else run_path.run.run_id,
        "created": None if run_path.run is None else run_path.run.created,
        "parent": None if lineage is None else lineage.to_json(),
        "checkpoints": [asdict(row) for row in rows_of(run_path)],
    }


def _print_overview(tree: Sequence[Branching]) -> None:
    rows = [_overview_row(item) for item in tree]
    columns = ("run", "newest step", "checkpoints", "size", "created")
    numbers = ("newest step", "checkpoints", "size")
    print_table(make_console(), make_table(columns, rows, numbers))


def _overview_row(item: Branching) -> tuple[str, ...]:
    """Return the line of a run from names and sizes: many runs have many manifests to read."""
    run_path = item.run_path
    steps = [step for folder in run_path.folders if (step := step_of(folder)) is not None]
    return (
        item.name,
        str(max(steps)) if steps else "-",
        str(len(run_path.folders)),
        size_text(sum(_nbytes_in(run_path, folder) for folder in run_path.folders)),
        "-" if run_path.run is None else date_text(run_path.run.created),
    )


def _nbytes_in(run_path: RunPath, folder: str) -> int:
    found = (run_path.storage.stat(f"{folder}/{name}") for name in run_path.storage.list(folder))
    return sum(stat.nbytes for stat in found if stat is not None)


def _print_each(run_paths: Sequence[RunPath]) -> None:
    console = make_console()
    columns = ("step", "created", "size", "tensors", "marks", "state")
    for number, run_path in enumerate(run_paths):
        console.print(*([""] if number else []), _title(run_path), sep="\n")
        rows = [_cells(row) for row in rows_of(run_path)]
        table = make_table(columns, rows, ("step", "size", "tensors"))
        if rows:
            print_table(console, table)
        else:
            console.print("no checkpoint yet")
    console.print(
        "state: manifests and file sizes were looked at; `unbroken verify` reads all bytes"
    )


def _print_branches(tree: Sequence[Branching]) -> None:
    make_console().print("\nbranches", style="bold")
    _print_overview(tree)


def _title(run_path: RunPath) -> str:
    origin = origin_of(run_path)
    return short(run_path.path) + ("" if origin is None else f": a branch of {origin}")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.folder.removeprefix("checkpoint-") if row.step is None else str(row.step),
        "-" if row.created is None else date_text(row.created),
        "-" if row.nbytes is None else size_text(row.nbytes),
        "-" if row.tensors is None else str(row.tensors),
        row.marks or "-",
        row.state,
    )
