"""Which checkpoints a selection means, the first choice first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unbroken.checkpoint.selection import Selection
from unbroken.errors import CheckpointNotFoundError
from unbroken.storage import Storage, storage_at
from unbroken.store import Catalog, CheckpointReader, Rejection


class Candidates:
    """The checkpoints of a run, and those that a path names.

    Args:
        catalog: What the run has.
        storage: The run directory.

    Attributes:
        origin: The folder outside of it that a selection named, or None.
    """

    def __init__(self, catalog: Catalog, storage: Storage) -> None:
        self._catalog = catalog
        self._storage = storage
        self.origin: str | None = None

    def of(self, selection: Selection) -> Iterator[CheckpointReader | Rejection]:
        """Yield what may be resumed, opened; or why it cannot be.

        Raises:
            CheckpointNotFoundError: The selection names a checkpoint that is not there.
        """
        if selection.kind in ("auto", "must"):
            yield from self._catalog.newest_first()
        elif selection.kind == "step" and selection.step is not None:
            yield self.at_step(selection.step)
        elif selection.kind == "best":
            yield self.at_step(self._best_step())
        elif selection.kind == "path" and selection.path is not None:
            yield from self._at_path(selection.path)

    def at_step(self, step: int) -> CheckpointReader:
        """Return the checkpoint of a step.

        Raises:
            CheckpointNotFoundError: There is none.
        """
        folders = self._catalog.folders()
        if step not in dict(folders):
            raise CheckpointNotFoundError(
                self._storage.describe(),
                "no such checkpoint",
                expected=f"one of the steps {[known for known, _ in folders]}",
                found=step,
            )
        return self._catalog.open(step)

    def _best_step(self) -> int:
        step = self._catalog.best_step()
        if step is None:
            raise CheckpointNotFoundError(
                self._storage.describe(), "no checkpoint knows which one is the best"
            )
        return step

    def _at_path(self, path: Path) -> Iterator[CheckpointReader | Rejection]:
        """Yield the checkpoint at `path`; but a run that already began there goes on instead."""
        folder = path.resolve()
        if folder.parent == Path(self._storage.describe()).resolve():
            yield CheckpointReader(self._storage, folder.name)
            return
        if not (folder / "manifest.json").exists():
            raise CheckpointNotFoundError(
                str(path),
                "is no checkpoint",
                expected="a folder with a manifest.json",
                hint="of a run directory, name one of its checkpoints",
            )
        origin = str(folder)
        for candidate in self._catalog.newest_first():
            if isinstance(candidate, Rejection) or candidate.manifest.facts.get("origin") == origin:
                yield candidate
        self.origin = origin
        yield CheckpointReader(storage_at(folder.parent, create=False), folder.name)
