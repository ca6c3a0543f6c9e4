"""One save: every rank stores its share, all agree, one rank commits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from unbroken.checkpoint.resume.selection import Origin
from unbroken.checkpoint.save.layout import Layout
from unbroken.checkpoint.save.rank_shares import CapturedState, RankShare, SharePlan, plan_share
from unbroken.distributed import Group, name_ranks
from unbroken.errors import ConfigError, RankError, SaveError, StateMismatchError
from unbroken.store import (
    CheckpointReader,
    CheckpointWriter,
    FileEntry,
    Json,
    KeepPolicy,
    RunDirectory,
    store_leaves,
)
from unbroken.store.format.names import checkpoint_name
from unbroken.store.run.directory import now_as_text


class SaveLineage:
    """The checkpoints that this process makes of a run: what the next one follows.

    Attributes:
        has_begun: Whether what is to be saved comes from the checkpoints that are there.
        is_torn: Whether a resume that failed has left the objects with parts of a checkpoint.
        origin: Facts of the checkpoint of another run that this one began in.
        skipped: What was not loaded then.
        previous: The checkpoint before, whose bytes are known: files like its are linked.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.is_torn = False
        self.origin: Origin = {}
        self.skipped: tuple[str, ...] = ()
        self.previous: CheckpointReader | None = None

    def resumed(
        self, checkpoint: CheckpointReader | None, origin: Origin, skipped: tuple[str, ...]
    ) -> None:
        """Go on from a checkpoint, every byte of which was read; None: one of elsewhere."""
        self.has_begun = True
        self.previous, self.origin, self.skipped = checkpoint, origin, skipped

    def refuse_another(self, run: RunDirectory) -> None:
        """Refuse to save into a run that has checkpoints this process did not resume from.

        Raises:
            ConfigError: It has such checkpoints.
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
        """Return what the manifest of a checkpoint says of its lineage."""
        return {"origin": None, **self.origin, "skip": list(self.skipped)}


def refuse_torn(run: RunDirectory, *, is_torn: bool) -> None:
    """Raise where checkpoints would be made of objects that hold parts of an old one.

    Raises:
        StateMismatchError: They hold such parts.
    """
    if is_torn:
        raise StateMismatchError(
            run.storage.describe(),
            "the objects hold parts of a checkpoint that turned out to be damaged",
            hint="build them anew, or start the process again",
        )


class SaveAbandonedError(Exception):
    """The copied bytes are not the state of the step: nothing was committed.

    Attributes:
        modified: By rank, the paths of the tensors that changed before they were copied.
    """

    def __init__(self, modified: Mapping[int, tuple[str, ...]]) -> None:
        super().__init__(modified)
        self.modified = modified


@dataclass(frozen=True)
class SaveRequest:
    """What a save is to make.

    Attributes:
        step: Completed optimizer steps.
        layout: Which tensor goes into which file, and the files besides.
        facts: For the manifest.
        keep: Which checkpoints stay once this one is there.
        history_fields: More fields for its line in history.jsonl.
        clock: Seconds since 1970.
    """

    step: int
    layout: Layout
    facts: Mapping[str, Json]
    keep: KeepPolicy
    history_fields: Mapping[str, Json]
    clock: Callable[[], float]


class SaveSession:
    """One checkpoint that all ranks make: staged, stored, agreed on, committed, pruned.

    It becomes visible only by the commit, and only after every rank has stored its share.
    A context: at its end a staging folder that was not committed is removed.

    Args:
        run: The run directory, as this rank sees it.
        request: What to make.
        state: What this rank captured.
        plan: How the ranks divided the save before.
        lineage: The checkpoints before.

    Attributes:
        step: Completed optimizer steps.
        share: What this rank stores; None: not planned yet.
        without_storage: Ranks that do not see the staging folder; None: not known yet.
    """

    def __init__(
        self,
        run: RunDirectory,
        request: SaveRequest,
        state: CapturedState,
        plan: SharePlan,
        lineage: SaveLineage,
    ) -> None:
        self.step = request.step
        self.share: RankShare | None = None
        self.without_storage: tuple[int, ...] | None = None
        self._run = run
        self._request = request
        self._files = request.layout.files()
        self._state = state
        self._plan = plan
        self._lineage = lineage
        self._previous, lineage.previous = lineage.previous, None  # until this one is committed
        self._folder: str | None = None  # the staging folder, when it is there
        self._writer: CheckpointWriter | None = None  # on rank 0

    def run(self, group: Group, modified: Callable[[], tuple[str, ...]] = tuple) -> None:
        """Make the checkpoint; nothing is committed unless all ranks have stored their share.

        Args:
            group: The ranks; each calls this.
            modified: Called once this rank has stored its share; returns the paths of tensors that
                changed before they were copied.

        Raises:
            SaveError: The disk failed or is full on this rank.
            SaveAbandonedError: Tensors of a rank changed before they were copied.
            RankError: Another rank failed.
        """
        if self._folder is None:
            self.stage(group)
        share = self.share or self.plan_share(group)
        stored, error = group.run_on_all("save", partial(self._store, share))
        by_rank = self._agree(group, stored, error, modified())
        group.run_on_all("commit", partial(self._commit_and_prune, by_rank))

    def stage(self, group: Group) -> None:
        """Make the staging folder, and find out which ranks do not see it.

        Raises:
            SaveError: The disk of rank 0 failed or is full.
            RankError: That happened on another rank, or other ranks see it than in an earlier save.
        """
        group.run_on_all("begin a save", partial(self._make_folder, group.rank))
        staging = None if self._writer is None else self._writer.staging
        self._folder = str(group.broadcast("the staging folder", staging))
        seen = group.gather("who sees the staging folder", self._sees_folder())
        unseen = tuple(rank for rank, sees in enumerate(seen) if not sees)
        if self.without_storage not in (None, unseen):
            ranks = tuple({*unseen} ^ {*(self.without_storage or ())})
            what = "does not see the same run directory as in the save before"
            raise RankError(name_ranks(ranks), what, ranks=ranks)
        self.without_storage = unseen

    def plan_share(self, group: Group) -> RankShare:
        """Decide together what this rank stores; the captured state is let go of.

        Raises:
            CaptureError: A value cannot be stored.
            ConfigError: A rank that does not see the folder has something of its own.
            RankError: The ranks have other objects, or another state of what is stored once.
        """
        file_of, unseen = self._request.layout.file_of, self.without_storage or ()
        self.share = plan_share(group, self._state, file_of, self._plan, unseen)
        self._state = replace(self._state, tree={})  # its copies hold memory
        return self.share

    def note_in_history(self, event: Mapping[str, Json]) -> None:
        """Append a line to history.jsonl; on rank 0 alone."""
        at: Json = now_as_text(self._request.clock)
        self._run.history.append({**event, "at": at})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.abandon()

    def _make_folder(self, rank: int) -> None:
        if rank > 0:
            return
        run, constant = self._run, self._request.layout.constant
        self._lineage.refuse_another(run)
        run.require_ownership()  # at the commit, too; here, before anything is written
        self._writer = CheckpointWriter(
            run.storage,
            step=self.step,
            run_id=run.run_id,
            clock=self._request.clock,
            like=self._previous if constant else None,
            constant=constant,
            require_ownership=run.require_ownership,
        )
        self._writer.expect(self._request.facts)

    def _sees_folder(self) -> bool:
        try:
            return self._run.storage.stat(str(self._folder)) is not None
        except OSError:
            return False

    def _store(self, share: RankShare) -> tuple[Sequence[FileEntry], SaveError | None]:
        """Write this rank's files. If rank 0 already removed the folder, its error says why."""
        files = {name: content() for name, content in share.files.items()}
        try:
            if self._writer is None:
                storage, folder = self._run.storage, str(self._folder)
                return store_leaves(storage, folder, share.leaves, files), None
            self._writer.write_leaves(share.leaves)
            for name, data in files.items():
                self._writer.write_file(name, data)
        except SaveError as error:
            if self._writer is not None or self._sees_folder():
                raise
            return (), error
        return (), None

    def _agree(
        self,
        group: Group,
        stored: Sequence[FileEntry],
        error: SaveError | None,
        modified: tuple[str, ...],
    ) -> Sequence[Any]:
        """Return what each rank has stored, if no rank objects to the commit."""
        own: Json = [[file.to_json() for file in stored], [*modified], error is not None]
        replies: Any = group.gather("what is stored", own)
        if error is not None:
            raise error
        if ranks := tuple(rank for rank, (*_, lost) in enumerate(replies) if lost):
            raise RankError(name_ranks(ranks), "lost the staging folder", ranks=ranks)
        if changed := {rank: tuple(paths) for rank, (_, paths, _) in enumerate(replies) if paths}:
            raise SaveAbandonedError(changed)
        return [files for files, *_ in replies]

    def _commit_and_prune(self, by_rank: Sequence[Any]) -> None:
        """On rank 0: commit, add a line to the history, remove what is no longer kept."""
        if self._writer is None:
            return
        run, request = self._run, self._request
        for files in by_rank[1:]:
            self._writer.adopt(FileEntry.from_json(file) for file in files)
        run.metrics.sync()  # a checkpoint must never promise lines that a power cut can take
        for name, data in self._files.items():
            self._writer.write_file(name, data)
        manifest = self._writer.commit(request.facts)
        if request.layout.constant:  # else there is nothing to link, and reading takes time
            self._lineage.previous = CheckpointReader(run.storage, checkpoint_name(self.step))
        saved = {"event": "saved", "at": now_as_text(request.clock), "step": self.step}
        fields = {"digest": manifest.state_digest, **request.history_fields}
        run.history.append({**saved, **fields})
        best = request.facts.get("best_step")
        run.prune(request.keep, best_steps=(best,) if isinstance(best, int) else ())
        self._writer = None
