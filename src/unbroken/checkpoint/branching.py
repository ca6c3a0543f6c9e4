"""Going on in a branch: find where it begins, make it or open it, and say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from unbroken.checkpoint.selection import Selection
from unbroken.errors import CheckpointNotFoundError, ConfigError
from unbroken.storage import Storage
from unbroken.store import Rejection, RunDirectory, branch, has_branch
from unbroken.store.layout import step_of


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
