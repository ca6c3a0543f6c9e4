"""List the checkpoints of a run, and find those that are intact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from unbroken.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    NewerFormatError,
)
from unbroken.storage import Storage
from unbroken.store.checkpoint.commit import ensure_folder, free_name, move_durably, settle_replaced
from unbroken.store.checkpoint.reader import CheckpointReader
from unbroken.store.format.canonical_json import Fields, Json, MalformedError, is_digest
from unbroken.store.format.manifest import Manifest
from unbroken.store.format.names import (
    MANIFEST_NAME,
    MAX_STEP,
    SET_ASIDE,
    checkpoint_name,
    step_of,
    step_of_replaced,
)

# Where a branch comes from: what its run.json says of the run that it left.


_MAX_CHECKPOINTS = 100


@dataclass(frozen=True)
class Lineage:
    """The parent run of a branch, and the checkpoints that the branch took over.

    Attributes:
        run_id: The run that was left.
        path: Its directory, as seen from the branch's when that was made: "../..". For people;
            a directory that was moved since is known by its id.
        step: How many optimizer steps the two have in common.
        checkpoints: The state digest of each checkpoint that the branch took over, by step: the
            one of `step`, and the best one known there.

    Example:
        >>> lineage = Lineage("a" * 32, "../..", 1200, {1000: "1" * 32, 1200: "2" * 32})
        >>> lineage.state_digest
        '22222222222222222222222222222222'
        >>> Lineage.from_json(lineage.to_json()) == lineage
        True
    """

    run_id: str
    path: str
    step: int
    checkpoints: Mapping[int, str]

    @property
    def state_digest(self) -> str:
        """The state digest of the checkpoint in which the branch begins."""
        return self.checkpoints[self.step]

    def covers(self, manifest: Manifest) -> bool:
        """Return whether a checkpoint is one that the branch took over."""
        return self.checkpoints.get(manifest.step) == manifest.state_digest

    def to_json(self) -> dict[str, Json]:
        """Return the lineage as run.json spells it."""
        taken: list[Json] = [
            {"state_digest": digest, "step": step}
            for step, digest in sorted(self.checkpoints.items())
        ]
        return {"checkpoints": taken, "id": self.run_id, "path": self.path, "step": self.step}

    @classmethod
    def from_json(cls, value: Json) -> Lineage:
        """Return the lineage that run.json spells.

        Raises:
            MalformedError: It is not what `to_json` writes.
        """
        fields = Fields(value, "parent")
        taken = [_read_taken(item) for item in fields.items("checkpoints", _MAX_CHECKPOINTS)]
        lineage = cls(
            run_id=fields.text("id"),
            path=fields.text("path"),
            step=fields.count("step", MAX_STEP),
            checkpoints=dict(taken),
        )
        fields.done()
        if lineage.step not in lineage.checkpoints or len(lineage.checkpoints) < len(taken):
            what = "parent does not name one checkpoint for its step"
            raise MalformedError(what, lineage.step, [step for step, _ in taken])
        return lineage


def belongs_to(manifest: Manifest, run_id: str, parent: Lineage | None) -> bool:
    """Return whether a checkpoint is the run's own: it wrote it, or took it over as a branch."""
    return manifest.run_id == run_id or (parent is not None and parent.covers(manifest))


def _read_taken(item: Json) -> tuple[int, str]:
    fields = Fields(item, "parent's checkpoint")
    step, digest = fields.count("step", MAX_STEP), fields.text("state_digest")
    fields.done()
    if not is_digest(digest):
        what = "parent's checkpoint has an impossible 'state_digest'"
        raise MalformedError(what, "32 hexadecimal digits", repr(digest))
    return step, digest


@dataclass(frozen=True)
class Rejection:
    """A checkpoint that cannot be used, and why.

    Attributes:
        folder: Its folder.
        step: Its step, by the name of the folder.
        reason: What is wrong with it, as a sentence.

    Example:
        >>> Rejection("checkpoint-10", 10, "state.json is missing").step
        10
    """

    folder: str
    step: int
    reason: str


class Catalog:
    """List, open and set aside the checkpoints of a run. Reading needs no lock.

    Args:
        storage: The run directory.
        run_id: Take no checkpoint of another run; None takes all.
        parent: Where the run comes from: what it took over from there is its own.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointWriter
        >>> storage = MemoryStorage()
        >>> for step in (5, 10):
        ...     manifest = CheckpointWriter(storage, step=step, run_id="a" * 32).commit({})
        >>> Catalog(storage).folders()
        [(5, 'checkpoint-5'), (10, 'checkpoint-10')]
        >>> reader, rejections = Catalog(storage).newest_intact()
        >>> reader.step, rejections
        (10, ())
    """

    def __init__(
        self, storage: Storage, run_id: str | None = None, parent: Lineage | None = None
    ) -> None:
        self._storage = storage
        self._run_id = run_id
        self._parent = parent

    def folders(self) -> list[tuple[int, str]]:
        """Return step and folder of every checkpoint by name, good or not, in rising order.

        The folder is "checkpoint-<step>"; or, where a process was killed while it replaced that
        one, the name under which it still counts.
        """
        found: dict[int, str] = {}
        if self._storage.stat(SET_ASIDE) is not None:
            for name in self._storage.list(SET_ASIDE):
                step = step_of_replaced(name)
                if step is not None:
                    found[step] = f"{SET_ASIDE}/{name}"
        for name in self._storage.list(""):
            step = step_of(name)
            if step is not None and (step not in found or self._has_manifest(name)):
                found[step] = name
        return sorted(found.items())

    def _has_manifest(self, folder: str) -> bool:
        return self._storage.stat(f"{folder}/{MANIFEST_NAME}") is not None

    def open(self, step: int) -> CheckpointReader:
        """Open the checkpoint of a step; its manifest and all file sizes are checked.

        Raises:
            CheckpointNotFoundError: There is none.
            CorruptCheckpointError: It is damaged, or of another step or run than its name says.
            NewerFormatError: A newer version of unbroken wrote it.
        """
        folder = dict(self.folders()).get(step)
        if folder is None:
            where = self._storage.describe(checkpoint_name(step))
            raise CheckpointNotFoundError(where, "there is no such checkpoint")
        return self._open(step, folder)

    def is_own(self, reader: CheckpointReader) -> bool:
        """Return whether a checkpoint is the run's own: it wrote it, or took it over."""
        if self._run_id is None:
            return True
        return belongs_to(reader.manifest, self._run_id, self._parent)

    def newest_first(self) -> Iterator[CheckpointReader | Rejection]:
        """Yield all checkpoints, newest first: opened, or the reason why they cannot be.

        What a branch took over from before it began is not among them: to go on from there
        would be another branch.

        Raises:
            NewerFormatError: At a checkpoint that a newer version wrote. It may be perfect:
                to go on from an older one would lose its steps without a word.
        """
        for step, folder in reversed(self.folders()):
            try:
                reader = self._open(step, folder)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                yield Rejection(folder, step, str(error))
            else:
                before = self._begins_later_than(reader)
                yield reader if before is None else Rejection(folder, step, before)

    def newest_intact(self) -> tuple[CheckpointReader | None, tuple[Rejection, ...]]:
        """Return the newest checkpoint of which every byte was read and matched.

        Returns:
            Its reader, or None if there is none; and the newer ones that were rejected.

        Raises:
            NewerFormatError: As `newest_first`.
        """
        rejections: list[Rejection] = []
        for candidate in self.newest_first():
            if isinstance(candidate, Rejection):
                rejections.append(candidate)
                continue
            try:
                candidate.check_rest()
            except CorruptCheckpointError as error:
                rejections.append(Rejection(candidate.folder, candidate.step, str(error)))
            else:
                return candidate, tuple(rejections)
        return None, tuple(rejections)

    def set_aside(self, step: int, reason: str) -> str:
        """Rename a checkpoint, durably, so that it is kept but never found again.

        Args:
            step: Its step.
            reason: Why; kept beside it in a text file.

        Returns:
            Its new folder, "set-aside/checkpoint-10.1"; the reason stands in the same name
            with ".txt".

        Raises:
            CheckpointNotFoundError: There is none.
            OSError: The storage fails; the checkpoint is where it was.
        """
        settle_replaced(self._storage)
        name = checkpoint_name(step)
        if self._storage.stat(name) is None:
            raise CheckpointNotFoundError(self._storage.describe(name), "there is none")
        ensure_folder(self._storage, SET_ASIDE)
        target = free_name(self._storage, SET_ASIDE, name)
        with self._storage.create(f"{target}.txt") as file:
            file.write(f"{reason}\n".encode())
            file.sync()
        move_durably(self._storage, name, target)
        return target

    def best_step(self) -> int | None:
        """Return the step that the newest checkpoint which knows one calls the best so far."""
        for candidate in self.newest_first():
            if isinstance(candidate, CheckpointReader):
                step = candidate.manifest.facts.get("best_step")
                if isinstance(step, int):
                    return step
        return None

    def _begins_later_than(self, reader: CheckpointReader) -> str | None:
        """Return what is wrong with going on from a checkpoint that was only taken over."""
        if self._parent is None or reader.step >= self._parent.step:
            return None
        if reader.manifest.run_id == self._run_id:
            return None
        return f"the branch begins at step {self._parent.step}, after it"

    def _open(self, step: int, folder: str) -> CheckpointReader:
        reader = CheckpointReader(self._storage, folder)
        where = self._storage.describe(folder)
        if reader.step != step:
            what = "holds another step than its name says"
            raise CorruptCheckpointError(where, what, expected=step, found=reader.step)
        if not self.is_own(reader):
            what, found = "belongs to another run", reader.manifest.run_id
            raise CorruptCheckpointError(where, what, expected=self._run_id, found=found)
        return reader
