"""Saving together: every rank stores its share, all agree, one rank commits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from unbroken.checkpoint.resume.selection import Origin
from unbroken.checkpoint.save.layout import Layout
from unbroken.checkpoint.save.rank_shares import Share
from unbroken.distributed import Group, name_ranks
from unbroken.errors import ConfigError, RankError, SaveError, StateMismatchError
from unbroken.storage import Storage
from unbroken.store import (
    CheckpointReader,
    CheckpointWriter,
    FileEntry,
    Json,
    KeepPolicy,
    Manifest,
    RunDirectory,
    store_leaves,
)
from unbroken.store.format.names import checkpoint_name
from unbroken.store.run.directory import now_as_text

if TYPE_CHECKING:
    from unbroken.checkpoint.resume.resume import Resumption


class GivenUpError(Exception):
    """What was copied is not the state of the step.

    Attributes:
        edited: By rank, the paths of the tensors that were changed meanwhile.
    """

    def __init__(self, edited: Mapping[int, tuple[str, ...]]) -> None:
        super().__init__(edited)
        self.edited = edited


class Saving:
    """One checkpoint that all ranks make: staged, stored, and committed by rank 0.

    A context: what was staged and not committed is removed at its end.

    Args:
        storage: The run directory, as this rank sees it.
        begin: Makes the writer; called on rank 0 alone.
        commit: Adds what rank 0 alone knows, and commits; called on rank 0 alone.
    """

    def __init__(
        self,
        storage: Storage,
        begin: Callable[[], CheckpointWriter],
        commit: Callable[[CheckpointWriter], object],
    ) -> None:
        self._storage = storage
        self._begin = begin
        self._commit = commit
        self._folder: str | None = None  # the staging folder, when it is there
        self._writer: CheckpointWriter | None = None

    @property
    def is_staged(self) -> bool:
        """Whether there is a staging folder."""
        return self._folder is not None

    def stage(self, group: Group) -> tuple[int, ...]:
        """Make the staging folder; return the ranks that do not see it.

        Raises:
            SaveError: The disk of rank 0 failed or is full.
            RankError: That happened on another rank.
        """
        group.together("begin a save", lambda: None if group.rank else self._make_writer())
        staging = None if self._writer is None else self._writer.staging
        self._folder = str(group.share("the staging folder", staging))
        seen = group.gather("who sees the staging folder", self._sees())
        return tuple(rank for rank, sees in enumerate(seen) if not sees)

    def store(
        self,
        group: Group,
        share: Share,
        edited: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Store it; nothing is committed unless all have stored and nobody objects.

        Args:
            group: The ranks; each calls this.
            share: What this rank stores.
            edited: Called when all have stored; returns the paths of tensors that were changed
                before they were copied.

        Raises:
            SaveError: The disk failed or is full on this rank.
            GivenUpError: A rank had such tensors; nothing was committed.
            RankError: Another rank failed; nothing was committed.
        """
        homeless: list[SaveError] = []
        stored = group.together("save", lambda: self._store_at_home(share, homeless))
        own: Json = [[file.to_json() for file in stored], [*edited()], bool(homeless)]
        told: Any = group.gather("what is stored", own)
        if homeless:
            raise homeless[0]
        if ranks := [rank for rank, (*_, lost) in enumerate(told) if lost]:
            raise RankError(name_ranks(ranks), "lost the staging folder", ranks=tuple(ranks))
        if changed := {rank: tuple(paths) for rank, (_, paths, _) in enumerate(told) if paths}:
            raise GivenUpError(changed)
        group.together("commit", lambda: self._commit_files([files for files, *_ in told]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.abandon()

    def _make_writer(self) -> None:
        self._writer = self._begin()

    def _sees(self) -> bool:
        try:
            return self._storage.stat(str(self._folder)) is not None
        except OSError:
            return False

    def _store_at_home(self, share: Share, homeless: list[SaveError]) -> Sequence[FileEntry]:
        """Store; where rank 0 has removed the folder meanwhile, its own error says why."""
        try:
            return self._store(share)
        except SaveError as error:
            if self._writer is not None or self._sees():
                raise
            homeless.append(error)
            return ()

    def _store(self, share: Share) -> Sequence[FileEntry]:
        files = {name: content() for name, content in share.files.items()}
        if self._writer is None:
            return store_leaves(self._storage, str(self._folder), share.leaves, files)
        self._writer.write_leaves(share.leaves)
        for name, data in files.items():
            self._writer.write_file(name, data)
        return ()

    def _commit_files(self, told: Sequence[Any]) -> None:
        if self._writer is None:
            return
        for files in told[1:]:
            self._writer.adopt(FileEntry.from_json(file) for file in files)
        self._commit(self._writer)
        self._writer = None


# Beginning and committing one checkpoint of a run, and what follows from it.


class Writing:
    """One checkpoint on its way into the run directory.

    Args:
        run: The run directory.
        step: Completed optimizer steps.
        layout: What stands where.
        facts: For the manifest.
        keep: Which checkpoints stay once this one is there.
        like: The checkpoint before: files that did not change since are linked.
        clock: Seconds since 1970.
        told: What the history is told besides.

    Attributes:
        made: The checkpoint, when it is there and has files that do not change.
    """

    def __init__(
        self,
        run: RunDirectory,
        step: int,
        layout: Layout,
        facts: Mapping[str, Json],
        keep: KeepPolicy,
        *,
        like: CheckpointReader | None,
        clock: Callable[[], float],
        told: Mapping[str, Json],
    ) -> None:
        self.made: CheckpointReader | None = None
        self._run = run
        self._step = step
        self._constant = layout.constant
        self._files = layout.files()
        self._facts = facts
        self._keep = keep
        self._like = like
        self._clock = clock
        self._told = told

    def begin(self) -> CheckpointWriter:
        """Return the writer."""
        run = self._run
        run.require_ownership()  # at the commit, too; here, before anything is written
        writer = CheckpointWriter(
            run.storage,
            step=self._step,
            run_id=run.run_id,
            clock=self._clock,
            like=self._like if self._constant else None,
            constant=self._constant,
            require_ownership=run.require_ownership,
        )
        writer.expect(self._facts)
        return writer

    def commit(self, writer: CheckpointWriter) -> Manifest:
        """Commit, tell the history, and remove what is no longer kept.

        Args:
            writer: It has stored all else.
        """
        run, best = self._run, self._facts.get("best_step")
        run.metrics.sync()  # a checkpoint must never promise lines that a power cut can take
        for name, data in self._files.items():
            writer.write_file(name, data)
        manifest = writer.commit(self._facts)
        if self._constant:  # else there is nothing to link, and reading takes time
            self.made = CheckpointReader(run.storage, checkpoint_name(self._step))
        saved = {"event": "saved", "at": now_as_text(self._clock), "step": self._step}
        run.history.append({**saved, "digest": manifest.state_digest, **self._told})
        run.prune(self._keep, best_steps=(best,) if isinstance(best, int) else ())
        return manifest


# The line of checkpoints that a run makes: what the next one comes after.


class Line:
    """Follows the checkpoints of one run; each new one tells where the line began.

    Attributes:
        has_begun: Whether what is to be saved comes from the checkpoints that are there.
        origin: Facts of the checkpoint of another run that this one began in.
        skipped: What was not loaded then.
        is_torn: Whether a resume that failed has left the objects with parts of a checkpoint.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.is_torn = False
        self.origin: Origin = {}
        self.skipped: tuple[str, ...] = ()
        self._last: Callable[[], CheckpointReader | None] = lambda: None

    def resumed(self, resumption: Resumption, checkpoint: CheckpointReader | None) -> None:
        """Go on from a checkpoint, every byte of which was read; None: one of elsewhere."""
        self.has_begun = True
        self.origin, self.skipped = resumption.origin, resumption.skipped
        self._last = lambda: checkpoint

    def refuse_another(self, run: RunDirectory) -> None:
        """Raise where a run with checkpoints would get a second, unrelated line of them.

        Raises:
            ConfigError: It would.
            StateMismatchError: What is to be saved is no whole state.
        """
        refuse_torn(run, is_torn=self.is_torn)
        found = () if self.has_begun else run.catalog.folders()
        if found:
            raise ConfigError(
                run.storage.describe(),
                "holds checkpoints that were not resumed",
                found=f"steps {[step for step, _ in found]}",
                hint='call resume() first; resume("never") starts anew and sets them aside',
            )
        self.has_begun = True

    def facts(self) -> dict[str, Json]:
        """Return what the manifest of a checkpoint tells of the line."""
        return {"origin": None, **self.origin, "skip": list(self.skipped)}

    def next(
        self,
        run: RunDirectory,
        step: int,
        layout: Layout,
        facts: Mapping[str, Json],
        keep: KeepPolicy,
        clock: Callable[[], float],
        told: Mapping[str, Json],
    ) -> Writing:
        """Return the next checkpoint, to be written; files like those of the last are linked."""
        last = self._last()
        made = Writing(run, step, layout, facts, keep, like=last, clock=clock, told=told)
        self._last = lambda: made.made
        return made


def refuse_torn(run: RunDirectory, *, is_torn: bool) -> None:
    """Raise where a line of checkpoints would begin in objects with parts of an old one.

    Raises:
        StateMismatchError: They hold such parts.
    """
    if is_torn:
        raise StateMismatchError(
            run.storage.describe(),
            "the objects hold parts of a checkpoint that turned out to be damaged",
            hint="build them anew, or start the process again",
        )
