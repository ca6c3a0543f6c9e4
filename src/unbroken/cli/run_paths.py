"""From a path on the command line to a run, and to the checkpoints in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unbroken.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    NewerFormatError,
    RunDirectoryError,
)
from unbroken.storage import Storage, storage_at
from unbroken.store import CheckpointReader, RunDirectory
from unbroken.store.format.names import MANIFEST_NAME, PINNED_NAME, RUN_NAME, step_of


@dataclass(frozen=True)
class RunPath:
    """What a path names: a whole run, or one checkpoint.

    Attributes:
        path: The path, absolute.
        run: The run, open for reading; None for a checkpoint that stands outside of any run.
        folder: The checkpoint's folder name; None: the whole run.
    """

    path: Path
    run: RunDirectory | None
    folder: str | None = None

    @property
    def folders(self) -> list[str]:
        """The folders of the checkpoints that the path names, by rising step."""
        if self.folder is not None:
            return [self.folder]
        return [] if self.run is None else [name for _, name in self.run.catalog.folders()]

    @property
    def storage(self) -> Storage:
        """Where the checkpoint folders stand."""
        if self.run is not None:
            return self.run.storage
        return storage_at(self.path.parent, create=False, folder=self.folder)

    def open(self, folder: str) -> CheckpointReader:
        """Open one of `folders`.

        Raises:
            CheckpointError: It is damaged, or newer than this version reads.
        """
        step = step_of(folder)
        if self.run is None or step is None:
            return CheckpointReader(self.storage, folder)
        return self.run.catalog.open(step)

    def newest(self) -> CheckpointReader | None:
        """Return the newest checkpoint that can be opened; None if there is none.

        Raises:
            NewerFormatError: A newer version wrote the newest of a run.
        """
        if self.run is not None and self.folder is None:
            return self.run.catalog.newest_that_opens()[0]
        try:
            return None if self.folder is None else self.open(self.folder)
        except CheckpointError:
            return None

    def narrowed(self, step: int) -> RunPath:
        """Return one checkpoint of the run.

        Raises:
            CheckpointNotFoundError: There is none of that step.
        """
        known = {} if self.run is None else dict(self.run.catalog.folders())
        if step not in known:
            expected = f"one of the steps {list(known)}"
            raise CheckpointNotFoundError(
                str(self.path), "no such checkpoint", expected=expected, found=step
            )
        return RunPath(self.path, self.run, known[step])


def open_run_path(text: str) -> RunPath:
    """Return what a path names.

    Raises:
        CheckpointNotFoundError: It names a checkpoint that is not in its run.
        RunDirectoryError: It names nothing, or something else.
    """
    path = Path(text).absolute()
    if is_run(path):
        return RunPath(path, RunDirectory.open_readonly(path))
    is_checkpoint_name = step_of(path.name) is not None
    if is_checkpoint_name and is_run(path.parent):
        run = RunPath(path.parent, RunDirectory.open_readonly(path.parent))
        return run.narrowed(step_of(path.name) or 0)
    if not path.exists():
        raise RunDirectoryError(text, "no such directory")
    if not (path / MANIFEST_NAME).is_file():
        raise RunDirectoryError(
            text,
            "is neither a run directory nor a checkpoint",
            expected=f"a {RUN_NAME} or a {MANIFEST_NAME} in it",
            hint="`unbroken ls` lists the runs that are here",
        )
    return RunPath(path, None, path.name)


def is_run(path: Path) -> bool:
    """Return whether a folder is the directory of a run."""
    return (path / RUN_NAME).is_file()


def runs_in(folder: Path) -> list[Path]:
    """Return the run directories that stand directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if is_run(path)) if folder.is_dir() else []


def is_pinned(reader: CheckpointReader) -> bool:
    """Return whether the user pinned a checkpoint, so that it is never removed."""
    return reader.storage.stat(f"{reader.folder}/{PINNED_NAME}") is not None


def best_step_of(run_path: RunPath) -> int | None:
    """Return the step that the newest readable checkpoint calls the best."""
    try:
        newest = run_path.newest()
    except NewerFormatError:
        return None
    step = None if newest is None else newest.manifest.facts.get("best_step")
    return step if isinstance(step, int) else None
