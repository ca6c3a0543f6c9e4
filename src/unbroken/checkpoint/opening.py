"""Opening the run directory: one rank owns it, the others look."""

from __future__ import annotations

from collections.abc import Callable

from unbroken.checkpoint.branching import open_branch
from unbroken.checkpoint.relay import UnseenStorage, open_as_another, place_of
from unbroken.checkpoint.report import ResumeReport
from unbroken.checkpoint.selection import Selection
from unbroken.distributed import Group
from unbroken.errors import ConfigError
from unbroken.storage import Storage
from unbroken.store import CheckpointReader, RunDirectory
from unbroken.store.layout import checkpoint_name


def open_together(
    group: Group,
    directory: str | Storage,
    branch: str | None,
    selection: Selection | None,
    *,
    clock: Callable[[], float],
    among_others: bool,
    unseen: bool,
) -> tuple[RunDirectory, tuple[str, ...]]:
    """Open the run directory on all ranks.

    Args:
        group: The ranks; each calls this. Rank 0 becomes the owner.
        directory: The run directory.
        branch: The branch of it that is meant.
        selection: Where a new branch begins.
        clock: Seconds since 1970.
        among_others: Whether the directory holds files that are not the run's.
        unseen: Whether the other ranks cannot see it.

    Returns:
        The run, and what the report of a resume says of the opening.
    """
    notes: tuple[str, ...] = ()

    def open_as_owner() -> RunDirectory | None:
        nonlocal notes
        if group.rank:
            return None
        if branch is None:
            return RunDirectory.open(directory, clock=clock, among_others=among_others)
        run, notes = open_branch(directory, branch, selection, clock=clock)
        return run

    what = "open the run directory"
    own = group.together(what, open_as_owner)
    place = group.share("the run directory", None if own is None else place_of(own))
    run = group.together(what, lambda: own or open_as_another(place, unseen=unseen))
    return run, notes


def refuse_second_line(run: RunDirectory) -> None:
    """Raise if a run has checkpoints, which what is to be saved does not come from.

    Raises:
        ConfigError: It has.
    """
    found = run.catalog.folders()
    if found:
        raise ConfigError(
            run.storage.describe(),
            "holds checkpoints that were not resumed",
            found=f"steps {[step for step, _ in found]}",
            hint='call resume() first; resume("never") starts anew and sets them aside',
        )


def reader_of(run: RunDirectory, report: ResumeReport) -> CheckpointReader | None:
    """Return the checkpoint that was resumed, every byte of which was read; None: elsewhere."""
    name = checkpoint_name(report.step)
    own = report.checkpoint == run.storage.describe(name)
    own = own and not isinstance(run.storage, UnseenStorage)
    return CheckpointReader(run.storage, name) if own else None
