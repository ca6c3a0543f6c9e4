"""What `resume_from_checkpoint` may say, read into one value."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from unbroken.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from unbroken.storage import Storage, storage_at
from unbroken.store import (
    Catalog,
    CheckpointReader,
    Journal,
    Json,
    Rejection,
    RunDirectory,
    branch,
    has_branch,
)
from unbroken.store.checkpoint.reader import CheckpointFolder
from unbroken.store.format.names import step_of

ResumeFrom = bool | int | str | os.PathLike[str] | None
"""What the user may give: see `Selection.parse`."""

_WORDS: dict[str, Literal["auto", "must", "never", "best"]] = {
    "auto": "auto",
    "latest": "must",
    "last": "must",
    "must": "must",
    "true": "must",
    "never": "never",
    "false": "never",
    "best": "best",
}


@dataclass(frozen=True)
class Selection:
    """Which checkpoint to resume from.

    Attributes:
        kind: "auto": the newest intact one, or a fresh start when there is none;
            "must": the newest intact one, or an error; "never": a fresh start;
            "best": the one with the best metric; "step": `step`; "path": `path`;
            "begun": the newest intact one of a run that began in `path`.
        step: The step asked for, with kind "step".
        path: The checkpoint folder asked for, with kind "path" and "begun".
    """

    kind: Literal["auto", "must", "never", "best", "step", "path", "begun"]
    step: int | None = None
    path: Path | None = None

    @classmethod
    def parse(cls, value: ResumeFrom | Selection) -> Selection:
        """Read what the user gave.

        Args:
            value: "auto" or None; True, "must", "latest" or "last"; False or "never"; "best";
                a step number (1200 or "1200"); the path of a checkpoint folder.

        Raises:
            ConfigError: If `value` is none of these.

        Example:
            >>> Selection.parse("latest").kind, Selection.parse(1200).step
            ('must', 1200)
        """
        if isinstance(value, Selection):
            return value
        if value is None:
            return cls("auto")
        if isinstance(value, bool):
            return cls("must" if value else "never")
        if isinstance(value, int):
            return cls("step", step=_positive(value))
        if isinstance(value, os.PathLike):
            return cls("path", path=Path(value))
        return cls._of_text(value)

    @classmethod
    def _of_text(cls, text: object) -> Selection:
        if not isinstance(text, str) or not text:
            raise ConfigError("resume_from_checkpoint", expected=_CHOICES, found=repr(text))
        word = _WORDS.get(text.lower())
        if word is not None:
            return cls(word)
        if text.lstrip("-").isdecimal():
            return cls("step", step=_positive(int(text)))
        return cls("path", path=Path(text))


_CHOICES = '"auto", "must", "never", "best", a step number or a checkpoint folder'


def _positive(step: int) -> int:
    if step < 0:
        raise ConfigError("resume_from_checkpoint", "a step is never negative", found=step)
    return step


# Which checkpoints a selection means, the first choice first.


Origin = Mapping[str, Json]
"""Facts of the checkpoint of another run in which this one began; empty: in none."""

_ORIGIN = ("origin", "origin_given", "origin_state")


class Candidates:
    """The checkpoints of a run, those that a path names, and those that were copied here.

    Args:
        catalog: What the run has.
        storage: The run directory.
        history: What happened to the run; None: nobody knows.
        state_at: Returns what tells the checkpoint in a folder from all others; None: nothing does.

    Attributes:
        origin: Of the checkpoint that was yielded last, if it is not the run's own.
    """

    def __init__(
        self,
        catalog: Catalog,
        storage: Storage,
        history: Journal | None = None,
        state_at: Callable[[Path], str | None] | None = None,
    ) -> None:
        self._catalog = catalog
        self._storage = storage
        self._history = history
        self._state_at = state_of if state_at is None else state_at
        self.origin: Origin = {}

    def resolved(self, selection: Selection) -> Selection:
        """Return what a selection means for this run.

        The path of a checkpoint of another run says where a run begins. One that began there goes
        on from its own newest: else the same command, given again and again, would never end.
        """
        if selection.kind == "path" and selection.path is not None and self._began_in(selection):
            return replace(selection, kind="begun")
        return selection

    def of(self, selection: Selection) -> Iterator[CheckpointReader | Rejection]:
        """Yield what may be resumed, opened; or why it cannot be.

        Raises:
            CheckpointNotFoundError: The selection names a checkpoint that is not there.
        """
        if selection.kind in ("auto", "must", "begun"):
            yield from self.newest_first()
        elif selection.kind == "step" and selection.step is not None:
            yield self.at_step(selection.step)
        elif selection.kind == "best":
            yield self.at_step(self._best_step())
        elif selection.kind == "path" and selection.path is not None:
            yield self._at_path(selection.path)

    def newest_first(self) -> Iterator[CheckpointReader | Rejection]:
        """Yield the run's own checkpoints; where it has none yet, those that were copied here."""
        for found in self._catalog.newest_first():
            self.origin = {}
            copied = self._copied(found) if isinstance(found, Rejection) else None
            yield found if copied is None else copied

    def at_step(self, step: int) -> CheckpointReader:
        """Return the checkpoint of a step.

        Raises:
            CheckpointNotFoundError: There is none.
        """
        folders = dict(self._catalog.folders())
        if step not in folders:
            raise CheckpointNotFoundError(
                self._storage.describe(),
                "no such checkpoint",
                expected=f"one of the steps {[*folders]}",
                found=step,
            )
        self.origin = {}
        copied = self._copied(Rejection(folders[step], step, ""))
        return self._catalog.open(step) if copied is None else copied

    def _copied(self, found: Rejection) -> CheckpointReader | None:
        """Return a checkpoint of another run that somebody has put here for this one to begin in.

        A run that has checkpoints of its own goes on from them alone.
        """
        try:
            reader = CheckpointReader(self._storage, found.folder)
        except CheckpointError:
            return None
        if self._catalog.is_own(reader) or self._has_own:
            return None
        self.origin = self._origin_at(Path(self._storage.describe(found.folder)))
        return reader

    @property
    def _has_own(self) -> bool:
        """Return whether a checkpoint here is the run's own, or was before it was damaged."""
        facts, damaged = self._newest
        saved = ("saved", "adopted")
        return facts is not None or (
            damaged and any(one.get("event") in saved for one in self._told())
        )

    @cached_property
    def _newest(self) -> tuple[Mapping[str, Json] | None, bool]:
        """The facts of the newest own checkpoint that can be opened; whether one cannot be."""
        damaged = False
        for _, folder in reversed(self._catalog.folders()):
            try:
                reader = CheckpointReader(self._storage, folder)
            except CheckpointError:
                damaged = True
                continue
            if self._catalog.is_own(reader):
                return reader.manifest.facts, damaged
        return None, damaged

    def _told(self) -> Iterator[Mapping[str, Any]]:
        return iter(()) if self._history is None else self._history.records(past_damage=True)

    def _began_in(self, selection: Selection) -> bool:
        """Return whether the run began in the checkpoint at a path, and has been saved since."""
        if selection.path is None or not self._has_own or self._is_here(selection.path):
            return False
        facts, _ = self._newest
        names = {os.path.abspath(selection.path), str(selection.path.resolve())}
        if facts is not None:
            known = {facts.get("origin"), facts.get("origin_given")}
            state = facts.get("origin_state")
            return bool(names & known) or (
                isinstance(state, str) and state == self._state_at(selection.path.resolve())
            )
        starts = [one for one in self._told() if one.get("event") in ("started", "adopted")]
        return bool(starts) and starts[-1].get("from", starts[-1].get("checkpoint")) in names

    def _is_here(self, path: Path) -> bool:
        """Return whether a path is that of one of the run's own checkpoints."""
        folder = path.resolve()
        if folder.parent != Path(self._storage.describe()).resolve():
            return False
        try:
            return self._catalog.is_own(CheckpointReader(self._storage, folder.name))
        except CheckpointError:
            return False

    def _best_step(self) -> int:
        step = self._catalog.best_step()
        if step is None:
            raise CheckpointNotFoundError(
                self._storage.describe(), "no checkpoint knows which one is the best"
            )
        return step

    def _at_path(self, path: Path) -> CheckpointReader:
        """Return the checkpoint at `path`."""
        folder = path.resolve()
        self.origin = {}
        if folder.parent == Path(self._storage.describe()).resolve():
            reader = CheckpointReader(self._storage, folder.name)
            if self._catalog.is_own(reader):
                return reader
        elif (folder / "manifest.json").exists():
            reader = CheckpointReader(storage_at(folder.parent, create=False), folder.name)
        else:
            raise CheckpointNotFoundError(
                str(path),
                "is no checkpoint",
                expected="a folder with a manifest.json",
                hint="of a run directory, name one of its checkpoints",
            )
        self.origin = self._origin_at(path)
        return reader

    def _origin_at(self, path: Path) -> Origin:
        return origin_of(path, self._state_at(path.resolve()))


def origin_of(path: Path, state: str | None) -> Origin:
    """Return the facts of a checkpoint of another run in which one begins.

    Args:
        path: As it was given.
        state: What tells it from all others.
    """
    given = os.path.abspath(path)
    return {"origin": str(path.resolve()), "origin_given": given, "origin_state": state}


def origin_in(facts: Mapping[str, Json]) -> Origin:
    """Return where the run began that made a checkpoint with these facts."""
    return {name: facts[name] for name in _ORIGIN if name in facts}


def state_of(folder: Path) -> str | None:
    """Return what tells a checkpoint of ours from all others, wherever it lies."""
    try:
        storage = storage_at(folder.parent, create=False)
        return CheckpointFolder(storage, folder.name).read_manifest().state_digest
    except (CheckpointError, OSError):
        return None


# Going on in a branch: find where it begins, make it or open it, and say so.


def open_branch(
    parent: str | Storage, name: str, selection: Selection | None, *, clock: Callable[[], float]
) -> tuple[RunDirectory, tuple[str, ...]]:
    """Open a branch of a run, which is made in the checkpoint selected unless it is there.

    A step or a path must be where it begins, also when it is there already. The other words
    choose where a new branch begins, and mean nothing to one that is there.

    Args:
        parent: The directory of the run that is left; another process may train in it.
        name: Names the branch.
        selection: Which checkpoint of the parent; None: only open a branch that is there.
        clock: Seconds since 1970.

    Returns:
        The branch, locked, and what the report of the start says about it.

    Raises:
        CheckpointNotFoundError: The parent has no such checkpoint, or none that is intact.
        ConfigError: The branch begins elsewhere; or nothing says where it could begin.
        RunDirectoryError: As `unbroken.store.branch`.
    """
    left = RunDirectory.open_readonly(parent)
    step, rejected = _beginning(left, name, selection)
    run = branch(left, name, step=step, clock=clock)
    begin = step if run.parent is None else run.parent.step
    told = [f"branch {name} of {_short(left.storage.describe())} at step {begin}"]
    told += [f"not used: {item.folder}: {item.reason}" for item in rejected]
    return run, tuple(told)


def beginning_of(parent: RunDirectory, name: str, selection: Selection) -> int | None:
    """Return the step in which a branch would begin that is not there yet; None: it is there.

    Raises:
        UnbrokenError: As `open_branch`.
    """
    return None if has_branch(parent, name) else _beginning(parent, name, selection)[0]


def _beginning(
    parent: RunDirectory, name: str, selection: Selection | None
) -> tuple[int | None, tuple[Rejection, ...]]:
    """Return the step that was asked for; None where a branch that is there is just continued."""
    if selection is not None and selection.kind == "never":
        hint = "give a step; for a run from step 0 give another output_dir and no branch"
        what = "begins in a checkpoint, and cannot be combined with"
        raise ConfigError("branch", what, found='resume_from_checkpoint="never"', hint=hint)
    if selection is not None and selection.kind == "step":
        return selection.step, ()
    if selection is not None and selection.path is not None:
        return _step_at(selection.path, parent), ()
    if selection is None or has_branch(parent, name):
        return None, ()
    return _best(parent) if selection.kind == "best" else _newest(parent)


def _step_at(path: Path, parent: RunDirectory) -> int:
    """Return the step that the path of a checkpoint of the parent names."""
    folder, step = path.resolve(), step_of(path.name)
    if step is None or folder.parent != Path(parent.storage.describe()).resolve():
        expected = f"a checkpoint of {parent.storage.describe()}"
        hint = "output_dir names the run to leave, resume_from_checkpoint one of its checkpoints"
        raise ConfigError(
            "branch", "begins in another run", expected=expected, found=str(path), hint=hint
        )
    return step


def _best(parent: RunDirectory) -> tuple[int, tuple[Rejection, ...]]:
    step = parent.catalog.best_step()
    if step is None:
        what = "no checkpoint knows which one is the best"
        raise CheckpointNotFoundError(parent.storage.describe(), what)
    return step, ()


def _newest(parent: RunDirectory) -> tuple[int, tuple[Rejection, ...]]:
    reader, rejected = parent.catalog.newest_intact()
    if reader is None:
        found = "; ".join(f"{item.folder}: {item.reason}" for item in rejected)
        what = "has no intact checkpoint to leave it at"
        raise CheckpointNotFoundError(parent.storage.describe(), what, found=found or "none")
    return reader.step, rejected


def _short(place: str) -> str:
    """Return a path as seen from the current directory, where it is below."""
    here = Path.cwd()
    return str(Path(place).relative_to(here)) if Path(place).is_relative_to(here) else place
