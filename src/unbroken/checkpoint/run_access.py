"""Opening the run directory: one rank owns it, the others look."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from unbroken.changes.differences import ResumeReport
from unbroken.checkpoint.resume.readers import UnseenStorage, open_as_another, place_of
from unbroken.checkpoint.resume.selection import Selection, beginning_of, open_branch
from unbroken.distributed import Group
from unbroken.errors import SaveError
from unbroken.storage import Storage
from unbroken.store import CheckpointReader, RunDirectory
from unbroken.store.format.names import checkpoint_name
from unbroken.store.run.directory import now_as_text

RefuseBeginning = Callable[[RunDirectory, int], None]
"""Raises if a branch that begins in the state of a step would be refused."""


class RunAccess:
    """Where the run of a group of ranks is; opened, and locked by rank 0, when first used.

    Args:
        group: The ranks; each makes all calls. Rank 0 becomes the owner.
        directory: The run directory.
        branch: The branch of it that is meant.
        clock: Seconds since 1970.
        unseen: Whether the other ranks cannot see it.

    Attributes:
        notes: What the report of a resume says of the opening.
        has_started: Whether a start of the run is told in its history, but no end.
    """

    def __init__(
        self,
        group: Group,
        directory: str | os.PathLike[str] | Storage,
        branch: str | None,
        *,
        clock: Callable[[], float],
        unseen: bool,
    ) -> None:
        if isinstance(directory, str | os.PathLike):
            directory = os.path.abspath(directory)  # the same run after a chdir
        self.notes: tuple[str, ...] = ()
        self.has_started = False
        self._group = group
        self._directory = directory
        self._branch = branch
        self._clock = clock
        self._unseen = unseen
        self._run: RunDirectory | None = None

    @property
    def is_open(self) -> bool:
        """Whether the run directory has been opened."""
        return self._run is not None

    def holds(self, path: Path) -> bool:
        """Return whether a path is that of something in the run directory."""
        given = self._directory
        where = given if isinstance(given, str) else given.describe()
        return path.resolve().parent == Path(where).resolve()

    def run(self, *, among_others: bool) -> RunDirectory:
        """Return the run directory; it may hold files that are not the run's if so said."""
        if self._run is None:
            self._run = self._open(None, among_others=among_others)
        return self._run

    def begin_branch(self, selection: Selection, refuse: RefuseBeginning) -> Selection:
        """Open the branch anew, which begins in `selection`; return which of its own it means.

        Args:
            selection: What is asked for.
            refuse: Raises if the state of a step of this run cannot be gone on from. A branch that
                would be refused is not made.
        """
        if self._branch is None:
            return selection
        self.close(None)
        self._refuse_beginning(self._branch, selection, refuse)
        self._run = self._open(selection, among_others=False)
        return Selection("auto")

    def _refuse_beginning(self, branch: str, selection: Selection, refuse: RefuseBeginning) -> None:
        group, what, given = self._group, "open the run directory", self._directory
        left = group.run_on_all(
            what, lambda: None if group.rank else RunDirectory.open_readonly(given)
        )
        step: Any = group.run_on_all(
            what, lambda: None if left is None else beginning_of(left, branch, selection)
        )
        step = group.broadcast("where the branch begins", step)
        if step is None:
            return
        place = group.broadcast("the run directory", None if left is None else place_of(left))
        unseen = self._unseen
        seen = group.run_on_all(what, lambda: left or open_as_another(place, given, unseen=unseen))
        refuse(seen, step)

    def close(self, error: BaseException | None) -> None:
        """Release the run directory, and tell the history if a start ends in an error."""
        run, self._run = self._run, None
        has_started, self.has_started = self.has_started, False
        if run is None:
            return
        failed = has_started and error is not None and not isinstance(error, SystemExit)
        if failed and self._group.rank == 0:
            record = {"event": "failed", "at": now_as_text(self._clock), "by": type(error).__name__}
            with suppress(SaveError):
                run.history.append(record)
        run.close()

    def _open(self, selection: Selection | None, *, among_others: bool) -> RunDirectory:
        group, what = self._group, "open the run directory"
        own = group.run_on_all(
            what, lambda: None if group.rank else self._open_as_owner(selection, among_others)
        )
        place = group.broadcast("the run directory", None if own is None else place_of(own))
        given, unseen = self._directory, self._unseen
        return group.run_on_all(what, lambda: own or open_as_another(place, given, unseen=unseen))

    def _open_as_owner(self, selection: Selection | None, among_others: bool) -> RunDirectory:
        directory, clock = self._directory, self._clock
        if self._branch is None:
            run = RunDirectory.open(directory, clock=clock, among_others=among_others)
            self.notes = run.notes
            return run
        run, notes = open_branch(directory, self._branch, selection, clock=clock)
        self.notes = (*notes, *run.notes)
        return run


def reader_of(run: RunDirectory, report: ResumeReport) -> CheckpointReader | None:
    """Return the checkpoint that was resumed, every byte of which was read; None: elsewhere."""
    name = checkpoint_name(report.step)
    own = report.checkpoint == run.storage.describe(name)
    own = own and not isinstance(run.storage, UnseenStorage)
    return CheckpointReader(run.storage, name) if own else None
