"""What a start of the host's Trainer resumes: from what its caller said to one folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unbroken.adapters.transformers.stock_checkpoint import STATE, is_stock, problem_of_stock
from unbroken.checkpoint import Selection
from unbroken.checkpoint.resume.selection import Candidates, state_of
from unbroken.distributed import Group
from unbroken.errors import CheckpointNotFoundError, CorruptCheckpointError
from unbroken.storage import storage_at
from unbroken.store import CheckpointReader, Rejection, RunDirectory
from unbroken.store.format.digest import digest_of

_STEPS = ("step", "best")


@dataclass(frozen=True)
class Chosen:
    """The checkpoint that a start goes on from.

    Attributes:
        folder: Where it is; None: the run begins.
        selection: What `Checkpointer.resume` is told.
        is_stock: Whether the host's own Trainer wrote it.
        rejected: Newer checkpoints that could not be used, and why.
        is_named: Whether the caller named this one checkpoint, by its path or step.
    """

    folder: Path | None
    selection: Selection
    is_stock: bool = False
    rejected: tuple[Rejection, ...] = ()
    is_named: bool = False


def choose(run: RunDirectory, wanted: Any) -> Chosen:
    """Find the checkpoint that is wanted, every byte of which is right.

    Args:
        run: The run directory.
        wanted: As `Checkpointer.resume` takes it. A path may also be that of a checkpoint of the
            host's own Trainer, or be meant inside the output directory.

    Raises:
        CheckpointNotFoundError: It is not there, or not one that was found is intact.
        CorruptCheckpointError: The one that was named is damaged.
    """
    selection = Selection.parse(wanted)
    candidates = Candidates(run.catalog, run.storage, run.history, state_of_any)
    if selection.kind == "never":
        return Chosen(None, selection)
    if selection.path is not None:
        selection = Selection("path", path=_folder_at(run, selection.path))
        begun = candidates.resolved(selection)
        if begun.kind != "begun":
            return _at_path(begun)
        return replace(_newest(run, candidates, begun), is_named=True)
    if selection.kind in _STEPS:
        return _at_step(run, candidates, selection)
    return _newest(run, candidates, selection)


def state_of_any(folder: Path) -> str | None:
    """Return what tells a checkpoint from all others, wherever it lies, the host's own too."""
    try:
        stock = folder / STATE  # a named pipe would be waited for
        own = state_of(folder)
        return own or (f"stock {digest_of(stock.read_bytes())}" if stock.is_file() else None)
    except OSError:
        return None


def choose_together(group: Group, run: RunDirectory, wanted: Any) -> Chosen:
    """Find on rank 0 what is wanted, and tell all ranks; see `choose`."""
    what = "choose a checkpoint"
    own = group.together(what, lambda: None if group.rank else choose(run, wanted))
    said: Any = None if own is None else _as_json(own)
    said = group.share(what, said)
    return own or _from_json(said)


def _as_json(chosen: Chosen) -> dict[str, Any]:
    selection = chosen.selection
    return {
        "folder": None if chosen.folder is None else str(chosen.folder.resolve()),
        "kind": selection.kind,
        "step": selection.step,
        "path": None if selection.path is None else str(selection.path.resolve()),
        "is_stock": chosen.is_stock,
    }


def _from_json(said: Any) -> Chosen:
    folder, path = (None if said[key] is None else Path(said[key]) for key in ("folder", "path"))
    selection = Selection(said["kind"], step=said["step"], path=path)
    return Chosen(folder, selection, is_stock=said["is_stock"])


def _folder_at(run: RunDirectory, path: Path) -> Path:
    inside = Path(run.storage.describe()) / path
    return path if path.exists() or not inside.exists() else inside


def _at_path(selection: Selection) -> Chosen:
    folder = selection.path or Path()
    if is_stock(folder):
        problem = problem_of_stock(folder)
        if problem is not None:
            raise CorruptCheckpointError(str(folder), problem)
        return Chosen(folder, Selection("never"), is_stock=True, is_named=True)
    if not folder.is_dir():
        expected = "the folder of a checkpoint"
        hint = '"latest" finds the newest intact one in output_dir'
        raise CheckpointNotFoundError(str(folder), "is not there", expected=expected, hint=hint)
    CheckpointReader(storage_at(folder.parent, create=False), folder.name).check_rest()
    return Chosen(folder, selection, is_named=True)


def _at_step(run: RunDirectory, candidates: Candidates, selection: Selection) -> Chosen:
    for reader in candidates.of(selection):
        if isinstance(reader, CheckpointReader):
            reader.check_rest()
            folder = Path(run.storage.describe(reader.folder))
            return Chosen(folder, selection, is_named=selection.kind == "step")
    raise CheckpointNotFoundError(run.storage.describe(), "no such checkpoint")


def _newest(run: RunDirectory, candidates: Candidates, selection: Selection) -> Chosen:
    rejected: list[Rejection] = []
    for found in candidates.newest_first():
        folder = Path(run.storage.describe(found.folder))
        if isinstance(found, CheckpointReader):
            problem = _problem_of(found)
            if problem is None:
                return Chosen(folder, selection, rejected=tuple(rejected))
            rejected.append(Rejection(found.folder, found.step, problem))
        elif is_stock(folder):
            problem = problem_of_stock(folder)
            if problem is None:
                return Chosen(folder, Selection("never"), is_stock=True, rejected=tuple(rejected))
            rejected.append(Rejection(found.folder, found.step, problem))
        else:
            rejected.append(found)
    if any(is_stock(Path(run.storage.describe(one.folder))) for one in rejected):
        lines = [f"{one.folder}: {one.reason}" for one in rejected]
        what = "not one of the checkpoints can be gone on from"
        hint = "\n".join([*lines, 'resume_from_checkpoint="never" starts anew'])
        raise CheckpointNotFoundError(run.storage.describe(), what, hint=hint)
    return Chosen(None, selection, rejected=tuple(rejected))


def _problem_of(reader: CheckpointReader) -> str | None:
    try:
        reader.check_rest()
    except CorruptCheckpointError as error:
        return str(error)
    return None
