"""Selecting a checkpoint: what `resume_from_checkpoint` may say, and which checkpoint that means.

All ranks decide together. The manifest of a candidate is valid, and file sizes match. Its bytes are
verified by the load; on damage the load asks for the next candidate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol

from unbroken.changes.differences import brief
from unbroken.checkpoint.resume.readers import (
    ReadAhead,
    Readers,
    ReadFrom,
    ReadOnEveryRank,
    ReadOnRank0,
    Source,
)
from unbroken.distributed import Group
from unbroken.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    UnbrokenError,
)
from unbroken.storage import Storage, storage_at
from unbroken.store import (
    Catalog,
    CheckpointReader,
    Journal,
    Json,
    Rejection,
    RunDirectory,
)
from unbroken.store.checkpoint.reader import CheckpointFolder
from unbroken.store.format.names import step_of

ResumeFrom = bool | int | str | os.PathLike[str] | None
"""What the user may give: see `ResumeChoice.parse`."""

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
class ResumeChoice:
    """Which checkpoint to resume from.

    Attributes:
        kind: "auto": the newest intact one, or a fresh start when there is none;
            "must": the newest intact one, or an error; "never": a fresh start;
            "best": the one with the best metric; "step": `step`; "path": `path`;
            "continue_from_path": the newest intact one of a run that began in `path`.
        step: The step asked for, with kind "step".
        path: The checkpoint folder asked for, with kind "path" and "continue_from_path".
    """

    kind: Literal["auto", "must", "never", "best", "step", "path", "continue_from_path"]
    step: int | None = None
    path: Path | None = None

    @classmethod
    def parse(cls, value: ResumeFrom | ResumeChoice) -> ResumeChoice:
        """Read what the user gave.

        Args:
            value: "auto" or None; True, "must", "latest" or "last"; False or "never"; "best";
                a step number (1200 or "1200"); the path of a checkpoint folder.

        Raises:
            ConfigError: If `value` is none of these.

        Example:
            >>> ResumeChoice.parse("latest").kind, ResumeChoice.parse(1200).step
            ('must', 1200)
        """
        if isinstance(value, ResumeChoice):
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
    def _of_text(cls, text: object) -> ResumeChoice:
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


class ForeignFormat(Protocol):
    """Knows the checkpoints of another library, which may lie among a run's own."""

    def is_one(self, folder: Path) -> bool:
        """Return whether that library wrote a folder, or began to."""

    def problem_of(self, folder: Path) -> str | None:
        """Return why its checkpoint cannot be continued; None: nothing is wrong to see."""

    def state_of(self, folder: Path) -> str | None:
        """Return what tells its checkpoint from all others, wherever it lies; None: nothing."""

    def require(self, folder: Path) -> None:
        """Raise CheckpointNotFoundError if nothing at a path can be a checkpoint of any format."""


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint that another library wrote.

    Attributes:
        path: Its folder.
        step: Its step, by the name of the folder; None: the name tells none.
    """

    path: Path
    step: int | None = None


FoundCheckpoint = CheckpointReader | ForeignCheckpoint | Rejection
"""A checkpoint that a selection means, or why it cannot be used."""


class CheckpointLookup:
    """The checkpoints of a run, those that a path names, and those that were copied here.

    Args:
        catalog, storage: The run directory.
        history: What happened to the run; None: nobody knows.
        foreign: The other format that is taken too.

    Attributes:
        origin: Of the checkpoint that was yielded last, if it is not the run's own.
    """

    def __init__(
        self,
        catalog: Catalog,
        storage: Storage,
        history: Journal | None = None,
        foreign: ForeignFormat | None = None,
    ) -> None:
        self._catalog = catalog
        self._storage = storage
        self._history = history
        self._foreign = foreign
        self.origin: Origin = {}

    def resolved(self, selection: ResumeChoice) -> ResumeChoice:
        """Return what a selection means for this run.

        The path of a checkpoint of another run says where a run begins. One that began there goes
        on from its own newest: else the same command, given again and again, would never end.
        """
        if selection.kind == "path" and selection.path is not None and self._began_in(selection):
            return replace(selection, kind="continue_from_path")
        return selection

    def of(self, selection: ResumeChoice) -> Iterator[FoundCheckpoint]:
        """Yield what may be resumed, opened; or why it cannot be.

        Raises:
            CheckpointNotFoundError: The selection names a checkpoint that is not there.
        """
        if selection.kind in ("auto", "must", "continue_from_path"):
            yield from self.newest_first()
        elif selection.kind == "step" and selection.step is not None:
            yield self.at_step(selection.step)
        elif selection.kind == "best":
            yield self.at_step(best_step(self._catalog, self._storage))
        elif selection.kind == "path" and selection.path is not None:
            yield self._at_path(selection.path)

    def newest_first(self) -> Iterator[FoundCheckpoint]:
        """Yield the run's own checkpoints; where it has none yet, those that were copied here."""
        for found in self._catalog.newest_first():
            self.origin = {}
            if isinstance(found, Rejection):
                yield self._copied(found) or self._foreign_in(found)
            else:
                yield found

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

    def _foreign_in(self, found: Rejection) -> ForeignCheckpoint | Rejection:
        """Return a checkpoint of the other format that is no checkpoint of ours."""
        path = Path(self._storage.describe(found.folder))
        if self._foreign is None or not self._foreign.is_one(path):
            return found
        problem = self._foreign.problem_of(path)
        if problem is None:
            return ForeignCheckpoint(path, found.step)
        return Rejection(found.folder, found.step, problem)

    @property
    def _has_own(self) -> bool:
        """Return whether a checkpoint here is the run's own, or was before it was damaged."""
        facts, damaged = self._newest
        saved = ("saved", "adopted")
        return facts is not None or (
            damaged and any(one.get("event") in saved for one in self._records())
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

    def _records(self) -> Iterator[Mapping[str, Any]]:
        return iter(()) if self._history is None else self._history.records(past_damage=True)

    def _began_in(self, selection: ResumeChoice) -> bool:
        """Return whether the run began in the checkpoint at a path, and has been saved since."""
        if selection.path is None or not self._has_own or self._is_here(selection.path):
            return False
        facts, _ = self._newest
        names = {os.path.abspath(selection.path), str(selection.path.resolve())}
        if facts is not None:
            known = {facts.get("origin"), facts.get("origin_given")}
            state = facts.get("origin_state")
            return bool(names & known) or (
                isinstance(state, str) and state == state_of(selection.path, self._foreign)
            )
        starts = [one for one in self._records() if one.get("event") in ("started", "adopted")]
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

    def _at_path(self, path: Path) -> CheckpointReader | ForeignCheckpoint:
        """Return the checkpoint at `path`."""
        folder = path.resolve()
        self.origin = {}
        if self._foreign is not None:
            if self._foreign.is_one(path):
                return _intact(path, self._foreign)
            self._foreign.require(path)
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
        return origin_of(path, self._foreign)


def _intact(path: Path, foreign: ForeignFormat) -> ForeignCheckpoint:
    problem = foreign.problem_of(path)
    if problem is not None:
        raise CorruptCheckpointError(str(path), problem)
    return ForeignCheckpoint(path)


def best_step(catalog: Catalog, storage: Storage) -> int:
    """Return the step that the newest checkpoint which knows one calls the best.

    Raises:
        CheckpointNotFoundError: None knows one.
    """
    step = catalog.best_step()
    if step is None:
        what = "no checkpoint knows which one is the best"
        raise CheckpointNotFoundError(storage.describe(), what)
    return step


def origin_of(path: Path, foreign: ForeignFormat | None = None) -> Origin:
    """Return the facts of a checkpoint of another run in which one begins.

    Args:
        path: As it was given.
        foreign: The other format that it may have.
    """
    given, state = os.path.abspath(path), state_of(path, foreign)
    return {"origin": str(path.resolve()), "origin_given": given, "origin_state": state}


def origin_in(facts: Mapping[str, Json]) -> Origin:
    """Return where the run began that made a checkpoint with these facts."""
    return {name: facts[name] for name in _ORIGIN if name in facts}


def state_of(path: Path, foreign: ForeignFormat | None = None) -> str | None:
    """Return what tells a checkpoint from all others, wherever it lies; None: nothing does."""
    folder = path.resolve()
    try:
        storage = storage_at(folder.parent, create=False)
        return CheckpointFolder(storage, folder.name).read_manifest().state_digest
    except (CheckpointError, OSError):
        return None if foreign is None else foreign.state_of(folder)


def may_resume(storage: Storage | None, selection: ResumeChoice) -> bool:
    """Return whether a run is likely to go on from a checkpoint: a guess, nothing is opened.

    Args:
        storage: The run directory; None: there is none yet.
        selection: What is asked for.
    """
    if selection.kind in ("never", "path"):
        return selection.kind == "path"
    return storage is not None and bool(Catalog(storage).folders())


def read_ahead(
    storage: Storage, selection: ResumeChoice, objects: Collection[str]
) -> ReadAhead | None:
    """Begin to read what a resume will choose; None if there is nothing, or it cannot be known.

    Whatever keeps the checkpoint from being opened is told by the resume.

    Args:
        storage: The run directory; another process may hold it, and is not disturbed.
        selection: What the resume will be asked for.
        objects: Names of the objects whose tensors are read.
    """
    with suppress(UnbrokenError, OSError):
        candidates = CheckpointLookup(Catalog(storage), storage)
        for candidate in candidates.of(candidates.resolved(selection)):
            if isinstance(candidate, CheckpointReader):
                return ReadAhead(candidate, objects)
    return None


# Going through them, all ranks alike, until one is good.


_NAMED = ("step", "path", "best")
"""Kinds of a selection that mean one checkpoint, whose place no other takes."""


@dataclass(frozen=True)
class Candidate:
    """The checkpoint that a start is to go on from, of which the bytes are still to be verified.

    Attributes:
        selector: Has found it.
        selection: What was asked for, as the run takes it.
        source: Reads it, as this rank does; None: it is of another format, or there is none.
        foreign: The checkpoint of another format.
        rejected: Newer checkpoints that could not be used, and why.
        origin: Facts of it, if it is not the run's own.
    """

    selector: CandidateSelector
    selection: ResumeChoice
    source: Source | None = None
    foreign: ForeignCheckpoint | None = None
    rejected: tuple[Rejection, ...] = ()
    origin: Origin = field(default_factory=dict)

    def after(self, damage: CorruptCheckpointError) -> Candidate:
        """Return the next one, as this one is damaged; raises as `CandidateSelector.first` does."""
        return self.selector.after(self, damage)


class DamagedCandidateError(CorruptCheckpointError):
    """A candidate turned out to be damaged while it was loaded; an older one is to take its place.

    Attributes:
        older: The next candidate.
    """

    def __init__(self, damage: CorruptCheckpointError, older: Candidate) -> None:
        super().__init__(damage.where, damage.what, expected=damage.expected, found=damage.found)
        self.older = older


class CandidateSelector:
    """Finds what a selection means, candidate after candidate. Rank 0 looks, all ranks follow.

    Args:
        run: The open run directory.
        group: The ranks; each makes all calls.
        read_from: Which of them read checkpoints.
        foreign: The other format that is taken too.
        examine: Called on every rank with each candidate: reads what of it has to be right before
            it is loaded. If it raises
            CorruptCheckpointError, the candidate is skipped.

    Attributes:
        readers: How the ranks open and load a checkpoint.
    """

    def __init__(
        self,
        run: RunDirectory,
        group: Group,
        read_from: ReadFrom,
        foreign: ForeignFormat | None = None,
        examine: Callable[[Candidate], None] | None = None,
    ) -> None:
        one_for_all = read_from == "rank0" and group.world_size > 1
        self.readers: Readers = (ReadOnRank0 if one_for_all else ReadOnEveryRank)(run, group)
        self.run = run
        self.group = group
        self._foreign = foreign
        self._examine = examine
        self._candidates = CheckpointLookup(run.catalog, run.storage, run.history, foreign)
        self._rest: Iterator[FoundCheckpoint] = iter(())
        self._selection = ResumeChoice("never")
        self._rejected: list[Rejection] = []

    def first(self, selection: ResumeChoice) -> Candidate:
        """Return the first candidate for a selection; one without a checkpoint: a fresh start.

        Raises:
            CheckpointNotFoundError: What is asked for is not there; or nothing is intact.
            CorruptCheckpointError: The one that is named is damaged.
        """
        self._selection, self._rejected = self._resolved(selection), []
        self._rest = iter(()) if self.group.rank else self._candidates.of(self._selection)
        return self._next()

    def after(self, candidate: Candidate, damage: CorruptCheckpointError) -> Candidate:
        """Return the next candidate, as damage was found in one; raises as `first` does."""
        self._reject(candidate, damage)
        return self._next()

    def at_step(self, step: int) -> Source:
        """Return the checkpoint of a step, as this rank reads it.

        Raises:
            CheckpointNotFoundError: There is none, or it cannot be seen from here.
        """
        found = self.group.run_on_all(
            "choose a checkpoint",
            lambda: None if self.group.rank else self._candidates.at_step(step),
        )
        source = self.readers.open(found, whole=False)
        if source is None or isinstance(source, Rejection):
            where = self.run.storage.describe()
            raise CheckpointNotFoundError(where, source.reason if source else "no checkpoint")
        return source

    def _resolved(self, selection: ResumeChoice) -> ResumeChoice:
        """Return what a selection means for this run, as rank 0 sees it."""
        if selection.kind != "path":
            return selection
        group, what = self.group, "what is to be resumed"
        own = group.run_on_all(
            what, lambda: None if group.rank else self._candidates.resolved(selection)
        )
        kind = group.broadcast(what, None if own is None else own.kind)
        return (
            replace(selection, kind="continue_from_path")
            if kind == "continue_from_path"
            else selection
        )

    def _next(self) -> Candidate:
        while (candidate := self._opened()) is not None:
            if self._examine is None:
                return candidate
            damage = self.readers.load(partial(self._examine, candidate))
            if damage is None:
                return candidate
            self._reject(candidate, damage)
        self._refuse_nothing_found()
        return Candidate(self, self._selection)

    def _reject(self, candidate: Candidate, damage: CorruptCheckpointError) -> None:
        if self._selection.kind in _NAMED:
            raise damage
        if candidate.source is not None:
            folder, step = candidate.source.folder, candidate.source.step
        else:
            path = Path() if candidate.foreign is None else candidate.foreign.path
            folder, step = path.name, step_of(path.name) or 0
        self._rejected.append(Rejection(folder, step, str(damage)))

    def _opened(self) -> Candidate | None:
        """Return the next one that can be opened; None: there is none."""
        while True:
            found = self.group.run_on_all("choose a checkpoint", lambda: next(self._rest, None))
            foreign = self._shared(found if isinstance(found, ForeignCheckpoint) else None)
            if foreign is not None:
                return self._candidate(foreign=foreign)
            own = None if isinstance(found, ForeignCheckpoint) else found
            seen = self.readers.open(own, whole=True)
            if seen is None:
                return None
            if not isinstance(seen, Rejection):
                return self._candidate(source=seen)
            self._rejected.append(seen)

    def _candidate(
        self, source: Source | None = None, foreign: ForeignCheckpoint | None = None
    ) -> Candidate:
        rejected, origin = tuple(self._rejected), self._candidates.origin
        return Candidate(self, self._selection, source, foreign, rejected, origin)

    def _shared(self, found: ForeignCheckpoint | None) -> ForeignCheckpoint | None:
        """Return the foreign checkpoint that rank 0 has found, if it has."""
        if self._foreign is None or self.group.world_size == 1:
            return found
        own = None if found is None else [str(found.path.resolve()), found.step]
        shared: Any = self.group.broadcast("a checkpoint of another format", own)
        return found or (None if shared is None else ForeignCheckpoint(Path(shared[0]), shared[1]))

    def _refuse_nothing_found(self) -> None:
        """Raise where a checkpoint had to be found; else a fresh start begins."""
        if self._selection.kind == "never":
            return
        where = self.run.storage.describe()
        if self._foreign is not None and self._rejected:
            self.group.run_on_all("choose a checkpoint", self._refuse_foreign)
        if self._rejected:
            raise CheckpointNotFoundError(
                where,
                "not one checkpoint is intact",
                found=f"{len(self._rejected)} damaged",
                hint="\n".join([*map(_in_short, self._rejected), _ALL_DAMAGED]),
            )
        if self._selection.kind == "must" or self.run.parent is not None:
            raise CheckpointNotFoundError(
                where,
                "no checkpoint to resume",
                hint='"auto" starts a new run where there is none, but never a branch',
            )

    def _refuse_foreign(self) -> None:
        """Raise, on rank 0, where one of those that cannot be used is of the other format."""
        if self.group.rank or self._foreign is None:
            return
        folders = (self.run.storage.describe(one.folder) for one in self._rejected)
        if any(self._foreign.is_one(Path(folder)) for folder in folders):
            lines = [f"{one.folder}: {one.reason}" for one in self._rejected]
            what = "no checkpoint here can be resumed"
            hint = "\n".join([*lines, 'resume_from_checkpoint="never" starts anew'])
            raise CheckpointNotFoundError(self.run.storage.describe(), what, hint=hint)


_ALL_DAMAGED = '`unbroken verify` lists all damage; resume_from_checkpoint="never" starts anew'


def _in_short(rejection: Rejection) -> str:
    """Return what is damaged in a checkpoint, in one short line."""
    first, *_ = rejection.reason.splitlines() or [""]
    _, found, what = first.partition(f"{rejection.folder}: ")
    return f"{rejection.folder}: {brief(what if found else first, 100)}"
