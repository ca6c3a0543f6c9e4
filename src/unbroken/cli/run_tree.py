"""Which runs there are below a folder, and which is a branch of which."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unbroken.cli.places import Place, is_run
from unbroken.errors import RunDirectoryError
from unbroken.store import Lineage, RunDirectory
from unbroken.store.layout import BRANCHES, SET_ASIDE, step_of


@dataclass(frozen=True)
class Branching:
    """A run at its place in the tree.

    Attributes:
        place: The run.
        depth: How many of its forebears are in the tree.
        parent: The run that it left, if that is in the tree.
    """

    place: Place
    depth: int
    parent: Place | None

    @property
    def name(self) -> str:
        """How a list calls it: with the step at which it left its parent, if it is a branch."""
        place, lineage = self.place, lineage_of(self.place)
        if lineage is None:
            return short(place.path)
        if self.parent is None:
            return f"{short(place.path)} at step {lineage.step} of run {lineage.run_id[:8]}"
        is_inside = place.path.parent == self.parent.path / BRANCHES
        name = place.path.name if is_inside else short(place.path)
        return f"{'  ' * self.depth}{name} at step {lineage.step}"


def lineage_of(place: Place) -> Lineage | None:
    """Return where a run comes from, if it is a branch."""
    return None if place.run is None else place.run.parent


def origin_of(place: Place) -> str | None:
    """Return in words where a branch comes from; None for a run that is none."""
    lineage = lineage_of(place)
    if lineage is None:
        return None
    parent = _recorded(place, lineage)
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


def as_tree(places: Sequence[Place]) -> list[Branching]:
    """Return runs so that each stands below the one that it left, by the steps where they left.

    A parent is known by its id. Of several copies with that id, the one that stands where the
    branch says is taken.
    """
    parents = {place.path: _parent_in(place, places) for place in places}
    roots = [place for place in places if parents[place.path] is None]
    tree = [item for root in roots for item in _with_branches(root, 0, None, places, parents)]
    reached = {item.place.path for item in tree}
    lost = [place for place in places if place.path not in reached]  # files edited by hand
    return tree + [Branching(place, 0, None) for place in lost]


def _with_branches(
    place: Place,
    depth: int,
    parent: Place | None,
    places: Sequence[Place],
    parents: dict[Path, Place | None],
) -> Iterator[Branching]:
    yield Branching(place, depth, parent)
    children = [one for one in places if parents[one.path] is place]
    for child in sorted(children, key=_left_at):
        yield from _with_branches(child, depth + 1, place, places, parents)


def _left_at(place: Place) -> tuple[int, Path]:
    lineage = lineage_of(place)
    return (0 if lineage is None else lineage.step, place.path)


def _parent_in(place: Place, places: Sequence[Place]) -> Place | None:
    lineage = lineage_of(place)
    if lineage is None:
        return None
    known = [one for one in places if one.run is not None and one.run.run_id == lineage.run_id]
    recorded = _recorded(place, lineage)
    return next((one for one in known if one.path == recorded), known[0] if known else None)


def _recorded(place: Place, lineage: Lineage) -> Path:
    return Path(os.path.normpath(place.path / lineage.path))


def short(path: Path) -> str:
    """Return the path as seen from the current directory, where it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
