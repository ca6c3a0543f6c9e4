"""`unbroken ls`: which runs there are, and which checkpoints they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from unbroken.cli.places import Place, best_step_of, is_pinned, is_run, open_place, runs_in
from unbroken.cli.run_tree import Branching, as_tree, lineage_of, origin_of, runs_below, short
from unbroken.cli.tables import (
    date_text,
    make_console,
    make_table,
    print_json,
    print_table,
    size_text,
)
from unbroken.errors import CheckpointError, RunDirectoryError
from unbroken.store import RunDirectory
from unbroken.store.layout import step_of

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
    places = _places(given)
    branches = _branches_below(places)
    if as_json:
        tree = as_tree([*places, *branches])
        print_json({"runs": [_run_json(item.place) for item in tree]})
    elif _is_overview(given, places):
        _print_overview(as_tree(places))
    else:
        _print_each(places)
        if branches:
            tree = as_tree([*places, *branches])
            _print_branches([item for item in tree if item.place in branches])
    return 0


def rows_of(place: Place) -> list[Row]:
    """Return the checkpoints of a run, by rising step."""
    best = best_step_of(place)
    return [_row(place, folder, best) for folder in place.folders]


def _row(place: Place, folder: str, best: int | None) -> Row:
    try:
        reader = place.open(folder)
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


def _places(given: Sequence[str]) -> list[Place]:
    if given:
        return [place for text in given for place in _places_at(text)]
    here = Path.cwd()
    found = [here] if is_run(here) else _runs_from(here)
    if not found:
        raise RunDirectoryError(
            str(here), "no run in ./runs or here", hint="name a run: unbroken ls RUN"
        )
    return [Place(path, RunDirectory.open_readonly(path)) for path in found]


def _places_at(text: str) -> list[Place]:
    """Return the run or checkpoint that a path names, or else the runs in that folder."""
    inside = [] if is_run(Path(text)) else runs_below(Path(text).absolute())
    return [open_place(str(path)) for path in inside] or [open_place(text)]


def _runs_from(here: Path) -> list[Path]:
    """Return the runs below ./runs, those that stand here, and their branches."""
    found = runs_below(here / "runs")
    found += [path for run in runs_in(here) for path in runs_below(run)]
    return list(dict.fromkeys(found))


def _branches_below(places: Sequence[Place]) -> list[Place]:
    """Return the runs that stand below the runs named, and are not named themselves."""
    named = {place.path for place in places}
    found = [path for place in places if place.folder is None for path in runs_below(place.path)]
    others = [path for path in dict.fromkeys(found) if path not in named]
    return [Place(path, RunDirectory.open_readonly(path)) for path in others]


def _is_overview(given: Sequence[str], places: Sequence[Place]) -> bool:
    """Return whether the paths name folders of runs, not runs: then one line a run is enough."""
    named = {Path(text).absolute() for text in given} or {Path.cwd()}
    return not any(place.path in named or place.folder is not None for place in places)


def _run_json(place: Place) -> dict[str, object]:
    lineage = lineage_of(place)
    return {
        "path": str(place.path),
        "id": None if place.run is None else place.run.run_id,
        "created": None if place.run is None else place.run.created,
        "parent": None if lineage is None else lineage.to_json(),
        "checkpoints": [asdict(row) for row in rows_of(place)],
    }


def _print_overview(tree: Sequence[Branching]) -> None:
    rows = [_overview_row(item) for item in tree]
    columns = ("run", "newest step", "checkpoints", "size", "created")
    numbers = ("newest step", "checkpoints", "size")
    print_table(make_console(), make_table(columns, rows, numbers))


def _overview_row(item: Branching) -> tuple[str, ...]:
    """Return the line of a run from names and sizes: many runs have many manifests to read."""
    place = item.place
    steps = [step for folder in place.folders if (step := step_of(folder)) is not None]
    return (
        item.name,
        str(max(steps)) if steps else "-",
        str(len(place.folders)),
        size_text(sum(_nbytes_in(place, folder) for folder in place.folders)),
        "-" if place.run is None else date_text(place.run.created),
    )


def _nbytes_in(place: Place, folder: str) -> int:
    found = (place.storage.stat(f"{folder}/{name}") for name in place.storage.list(folder))
    return sum(stat.nbytes for stat in found if stat is not None)


def _print_each(places: Sequence[Place]) -> None:
    console = make_console()
    columns = ("step", "created", "size", "tensors", "marks", "state")
    for number, place in enumerate(places):
        console.print(*([""] if number else []), _title(place), sep="\n")
        rows = [_cells(row) for row in rows_of(place)]
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


def _title(place: Place) -> str:
    origin = origin_of(place)
    return short(place.path) + ("" if origin is None else f": a branch of {origin}")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.folder.removeprefix("checkpoint-") if row.step is None else str(row.step),
        "-" if row.created is None else date_text(row.created),
        "-" if row.nbytes is None else size_text(row.nbytes),
        "-" if row.tensors is None else str(row.tensors),
        row.marks or "-",
        row.state,
    )
