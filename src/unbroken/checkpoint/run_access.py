"""Opening the run directory, or a branch of it: one rank owns it, the others look."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakMethod, WeakValueDictionary, finalize

from unbroken.changes.differences import ResumeReport
from unbroken.checkpoint.resume.readers import UnseenStorage
from unbroken.checkpoint.resume.selection import ResumeChoice, best_step
from unbroken.checkpoint.save.async_saver import AsyncSaver
from unbroken.distributed import Group
from unbroken.errors import (
    CheckpointNotFoundError,
    ConfigError,
    LockHeldError,
    RunDirectoryError,
    SaveError,
)
from unbroken.storage import FolderStorage, Storage
from unbroken.store import (
    CheckpointReader,
    Json,
    Lineage,
    Rejection,
    RunDirectory,
    branch,
    has_branch,
)
from unbroken.store.format.names import checkpoint_name, step_of
from unbroken.store.run.directory import RunIdentity, now_as_text

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
        give_way: Closes what holds this, if it is idle, and returns whether it did.

    Attributes:
        notes: What the report of a resume says of the opening.
        has_started: Whether a start of the run is told in its history, but no end.
        finish: Ends the last save of an owner that is gone, after which the run is released; None:
            the owner is there.
    """

    def __init__(
        self,
        group: Group,
        directory: str | os.PathLike[str] | Storage,
        branch: str | None,
        *,
        clock: Callable[[], float],
        unseen: bool,
        give_way: WeakMethod[Callable[[], bool]],
    ) -> None:
        if isinstance(directory, str | os.PathLike):
            directory = os.path.abspath(directory)  # the same run after a chdir
        self.notes: tuple[str, ...] = ()
        self.has_started = False
        self.finish: Callable[[], None] | None = None
        self._group = group
        self._directory = directory
        self._branch = branch
        self._clock = clock
        self._unseen = unseen
        self._give_way = give_way
        self._run: RunDirectory | None = None

    @property
    def is_open(self) -> bool:
        """Whether the run directory has been opened."""
        return self._run is not None

    @property
    def is_alone(self) -> bool:
        """Whether one process trains."""
        return self._group.world_size == 1

    def holds(self, path: Path) -> bool:
        """Return whether a path is that of something in the run directory."""
        given = self._directory
        where = given if isinstance(given, str) else given.describe()
        return path.resolve().parent == Path(where).resolve()

    def run(self, *, may_hold_foreign_files: bool) -> RunDirectory:
        """Return the run directory; it may hold files that are not the run's if so said."""
        if self._run is None:
            self._run = self._open(None, may_hold_foreign_files=may_hold_foreign_files)
        return self._run

    def begin_branch(self, selection: ResumeChoice, refuse: RefuseBeginning) -> ResumeChoice:
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
        self._run = self._open(selection, may_hold_foreign_files=False)
        return ResumeChoice("auto")

    def _refuse_beginning(
        self, branch: str, selection: ResumeChoice, refuse: RefuseBeginning
    ) -> None:
        group, what, given = self._group, "open the run directory", self._directory
        left = group.run_on_all(
            what, lambda: None if group.rank else RunDirectory.open_readonly(given)
        )
        step: Any = group.run_on_all(
            what, lambda: None if left is None else _beginning_of(left, branch, selection)
        )
        step = group.broadcast("where the branch begins", step)
        if step is None:
            return
        known = group.broadcast("the run directory", None if left is None else _described(left))
        unseen = self._unseen
        seen = group.run_on_all(what, lambda: left or _open_as_another(known, given, unseen=unseen))
        refuse(seen, step)

    def reader_of(self, report: ResumeReport) -> CheckpointReader | None:
        """Return the checkpoint that was resumed, every byte of which was read; None: elsewhere."""
        run, name = self._run, checkpoint_name(report.step)
        if run is None or isinstance(run.storage, UnseenStorage):
            return None
        own = report.checkpoint == run.storage.describe(name)
        return CheckpointReader(run.storage, name) if own else None

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

    def release(self) -> None:
        """Release the run directory of an owner that is gone, who can hear of no error."""
        with suppress(OSError):
            self.close(None)

    def _open(
        self, selection: ResumeChoice | None, *, may_hold_foreign_files: bool
    ) -> RunDirectory:
        group, what = self._group, "open the run directory"
        own = group.run_on_all(
            what,
            lambda: None if group.rank else self._open_as_owner(selection, may_hold_foreign_files),
        )
        known = group.broadcast("the run directory", None if own is None else _described(own))
        given, unseen = self._directory, self._unseen
        return group.run_on_all(what, lambda: own or _open_as_another(known, given, unseen=unseen))

    def _open_as_owner(
        self, selection: ResumeChoice | None, may_hold_foreign_files: bool
    ) -> RunDirectory:
        try:
            run = self._opened(selection, may_hold_foreign_files)
        except LockHeldError:
            if not self._gets_way():
                raise
            run = self._opened(selection, may_hold_foreign_files)
        _OWNERS[self._key] = self
        return run

    @property
    def _key(self) -> str:
        given = self._directory
        where = given if isinstance(given, str) else given.describe()
        return where if self._branch is None else f"{where}: {self._branch}"

    def _gets_way(self) -> bool:
        """Return whether an owner in this process, dropped or idle, has let the run go."""
        if self._key not in _OWNERS:
            return False
        gc.collect()  # what was dropped may stand in a cycle; its end lets the run go
        other = _OWNERS.get(self._key)
        if other is not None and other.finish is not None:
            with suppress(SaveError):
                other.finish()
            return True
        give_way = None if other is None else other._give_way()  # noqa: SLF001 (of its own class)
        return other is None or (give_way is not None and give_way())

    def _opened(self, selection: ResumeChoice | None, may_hold_foreign_files: bool) -> RunDirectory:
        directory, clock = self._directory, self._clock
        if self._branch is None:
            run = RunDirectory.open(
                directory, clock=clock, may_hold_foreign_files=may_hold_foreign_files
            )
            self.notes = run.notes
            return run
        run, notes = _open_branch(directory, self._branch, selection, clock=clock)
        self.notes = (*notes, *run.notes)
        return run


def let_go_when_dropped(owner: object, saver: AsyncSaver, access: RunAccess) -> None:
    """Finish the last save and release the run when nobody holds its owner any more.

    Not on several ranks, which do that together; nor at the exit, where others see to it. The
    garbage collector may do this anywhere in the training thread, in a step or while a lock is
    held: nothing is waited for, and no error is raised there.
    """
    if not access.is_alone:
        return
    pid = os.getpid()

    def let_go() -> None:
        if os.getpid() == pid:  # a forked process has copies of both
            access.finish = saver.wait
            saver.abandon(access.release)

    finalize(owner, let_go).atexit = False


_OWNERS: WeakValueDictionary[str, RunAccess] = WeakValueDictionary()
"""Who has opened a run in this process as its owner, by the directory."""


# What other ranks see of it.


def _described(directory: RunDirectory) -> Json:
    """Return what the other ranks must know of the run directory."""
    parent = None if directory.parent is None else directory.parent.to_json()
    identity = {"id": directory.run_id, "created": directory.created, "parent": parent}
    return {"directory": directory.storage.describe(), **identity}


def _open_as_another(said: Any, given: str | Storage, *, unseen: bool) -> RunDirectory:
    """Return the run directory of rank 0 for another rank: to look at, or only by its name.

    Args:
        said: What rank 0 says of it; see `_described`.
        given: The directory, or the parent of the branch, as this rank was given it.
        unseen: Whether only rank 0 can see it.

    Raises:
        RunDirectoryError: It cannot be seen from here.
    """
    if unseen:
        parent = None if said["parent"] is None else Lineage.from_json(said["parent"])
        identity = RunIdentity(said["id"], said["created"], parent)
        return RunDirectory(UnseenStorage(said["directory"]), identity, None)
    try:
        return RunDirectory.open_readonly(_seen_from_here(said["directory"], given))
    except RunDirectoryError as error:
        error.add_note('a folder that only rank 0 sees: read_from="rank0"')
        raise


def _seen_from_here(path: str, given: str | Storage) -> str | Storage:
    """Return rank 0's directory in the storage that this rank was given, if that leads there."""
    if isinstance(given, str) or not f"{path}/".startswith(f"{given.describe()}/"):
        return path
    return FolderStorage(given, path[len(given.describe()) + 1 :])


# Going on in a branch: find where it begins, make it or open it, and say so.


def _open_branch(
    parent: str | Storage, name: str, selection: ResumeChoice | None, *, clock: Callable[[], float]
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
    notes = [f"branch {name} of {_short(left.storage.describe())} at step {begin}"]
    notes += [f"not used: {item.folder}: {item.reason}" for item in rejected]
    return run, tuple(notes)


def _beginning_of(parent: RunDirectory, name: str, selection: ResumeChoice) -> int | None:
    """Return the step in which a branch would begin that is not there yet; None: it is there.

    Raises:
        UnbrokenError: As `_open_branch`.
    """
    return None if has_branch(parent, name) else _beginning(parent, name, selection)[0]


def _beginning(
    parent: RunDirectory, name: str, selection: ResumeChoice | None
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
    if selection.kind == "best":
        return best_step(parent.catalog, parent.storage), ()
    return _newest(parent)


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


def _newest(parent: RunDirectory) -> tuple[int, tuple[Rejection, ...]]:
    reader, rejected = parent.catalog.newest_intact()
    if reader is None:
        found = "; ".join(f"{item.folder}: {item.reason}" for item in rejected)
        what = "has no intact checkpoint to leave it at"
        raise CheckpointNotFoundError(parent.storage.describe(), what, found=found or "none")
    return reader.step, rejected


def _short(path: str) -> str:
    """Return a path as seen from the current directory, where it is below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
