"""One save: every rank stores its share, all agree, rank 0 commits; and how its folder looks.

A rehearsal finds, before or right after the first step, what a save could not store.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from unbroken.capture import (
    FileOf,
    all_objects,
    capture,
    files_for,
    is_sharded,
    named_buffers,
    named_parameters,
    pretrained_files,
    refuse_what_cannot_be_stored,
    unwrapped,
)
from unbroken.checkpoint.resume.selection import Origin
from unbroken.checkpoint.save.rank_shares import CapturedState, RankShare, SharePlan, plan_share
from unbroken.distributed import Group, name_ranks
from unbroken.errors import (
    ConfigError,
    LockHeldError,
    RankError,
    RunDirectoryError,
    SaveError,
    StateMismatchError,
)
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

# How the folder looks: what stands where, and which files it has besides. Weights that are not
# trained have a file of their own, which later checkpoints link.


_USUAL = "model.safetensors"
FROZEN, TRAINED = "model-frozen.safetensors", "model-trained.safetensors"
INDEX = "model.safetensors.index.json"
_WORTH_A_FILE = 1 << 20  # bytes


def frozen_apart(model: nn.Module, usual: FileOf) -> tuple[FileOf, bytes] | None:
    """Return the rule that keeps a model's frozen parameters apart, and the index of its files.

    The index is what `from_pretrained` looks for where a model is in several files.

    Args:
        model: The module; wrappers are looked through.
        usual: The rule for all else.

    Returns:
        None where little is frozen, or all, or where several ranks hold the model together.
    """
    model = unwrapped(model)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    if all(trained) or any(map(is_sharded, model.parameters())):
        return None
    stored = dict(_stored(model))
    frozen = {
        name
        for name, tensor in stored.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }
    nbytes = sum(stored[name].nbytes for name in frozen)
    if nbytes < _WORTH_A_FILE or not any(trained):
        return None

    def file_of(path: str) -> tuple[str, str]:
        file, name = usual(path)
        if file != _USUAL:
            return file, name
        return (FROZEN if name in frozen else TRAINED), name

    return file_of, _index(stored, {name: file_of(f"model.{name}")[0] for name in stored})


def _stored(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the model's file, those that share memory under the first name."""
    seen: set[tuple[int, int]] = set()
    for name, tensor in (*named_parameters(model), *named_buffers(model, persistent=True)):
        memory = (tensor.data_ptr() or id(tensor), tensor.nbytes)
        if memory not in seen:
            seen.add(memory)
            yield name, tensor


def _index(stored: Mapping[str, torch.Tensor], files: Mapping[str, str]) -> bytes:
    total = sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    return json.dumps(index, indent=2, sort_keys=True).encode()


@dataclass(frozen=True)
class Layout:
    """How the folder of a checkpoint looks.

    Attributes:
        file_of: Gives each leaf its file and its name there.
        constant: Files of tensors that seldom change: one that is the same as in the checkpoint
            before is linked, not written again.
        files: More files, by name, for other programs; no resume reads them.
    """

    file_of: FileOf
    constant: frozenset[str] = frozenset()
    files: Callable[[], Mapping[str, bytes]] = dict

    @classmethod
    def of(cls, objects: Mapping[str, object]) -> Layout:
        """Return the usual layout: a file for each object, and what `from_pretrained` needs.

        What a model does not train has a file of its own, once it is worth one: it is written
        once, and linked in each later checkpoint as long as it is the same.
        """
        model, usual = objects.get("model"), files_for(objects)
        if not isinstance(model, nn.Module):
            return cls(usual)
        apart = frozen_apart(model, usual)
        if apart is None:
            return cls(usual, files=lambda: pretrained_files(model))
        file_of, index = apart
        files = {INDEX: index}
        return cls(file_of, frozenset({FROZEN}), lambda: {**pretrained_files(model), **files})

    def with_files(self, more: Callable[[], Mapping[str, bytes]]) -> Layout:
        """Return the same layout with more files for other programs."""
        return replace(self, files=lambda: {**self.files(), **more()})


# The save.


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
        """Go on from a checkpoint, every byte of which was read.

        None: the checkpoint is not in this run directory.
        """
        self.has_begun = True
        self.previous, self.origin, self.skipped = checkpoint, origin, skipped

    def require_resumed(self, run: RunDirectory) -> None:
        """Refuse to save into a run that has checkpoints this process did not resume from.

        Raises:
            ConfigError: It has such checkpoints.
            StateMismatchError: What is to be saved is no whole state.
        """
        self.refuse_torn(run)
        found = () if self.has_begun else run.catalog.folders()
        if found:
            raise ConfigError(
                run.storage.describe(),
                "holds checkpoints that were not resumed",
                found=f"steps {[step for step, _ in found]}",
                hint='call resume() first; resume("never") starts anew and sets them aside',
            )
        self.has_begun = True

    def refuse_torn(self, run: RunDirectory) -> None:
        """Raise where checkpoints would be made of objects that hold parts of an old one.

        Raises:
            StateMismatchError: They hold such parts.
        """
        if self.is_torn:
            raise StateMismatchError(
                run.storage.describe(),
                "the objects hold parts of a checkpoint that turned out to be damaged",
                hint="build them anew, or start the process again",
            )

    def facts(self) -> dict[str, Json]:
        """Return what the manifest of a checkpoint says of its lineage."""
        return {"origin": None, **self.origin, "skip": list(self.skipped)}


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
        by_rank = self._gather_and_check(group, stored, error, modified())
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
        self._lineage.require_resumed(run)
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

    def _gather_and_check(
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
        """On rank 0: commit, add a line to the history, remove what is no longer kept.

        If one of the last two fails, the save raises although its checkpoint stands, whole and
        durable: a resume takes it, and saving the same state again keeps it.
        """
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
        self._prune()
        self._writer = None

    def _prune(self) -> None:
        best = self._request.facts.get("best_step")
        try:
            self._run.prune(self._request.keep, best_steps=(best,) if isinstance(best, int) else ())
        except LockHeldError:
            raise
        except RunDirectoryError as error:
            where = self._run.storage.describe(checkpoint_name(self.step))
            what = "is whole and durable, but checkpoints that are not kept could not be removed"
            hint = "look at what the storage says; the next save tries it again"
            raise SaveError(where, what, found=str(error), hint=hint) from error


# Whether a save would work is known before the first step, or right after it: not at the first
# save. The state of an optimizer comes with its first step, and that of loaders and callbacks with
# the first batch. So what a save would meet is looked at twice: at the start, and after one step.


class Rehearsal:
    """Looks once at all that a save would store; nothing is copied, and nothing is written."""

    def __init__(self, objects: Mapping[str, object]) -> None:
        self._objects = objects
        self._hooks: dict[Optimizer, tuple[RemovableHandle, RemovableHandle]] = {}
        self._open: Counter[Optimizer] = Counter()
        self._begun_at: int | None = None

    def at_the_start(self, group: Group) -> None:
        """Look at modules, optimizers and the like; objects of other kinds are not asked yet.

        Raises:
            CaptureError: Something in them cannot be stored.
        """
        group.run_on_all("capture the state", lambda: self._look(call_state_dict=False))

    def begin(self, step: int) -> None:
        """Let each optimizer be looked at after its first step, whoever calls that."""
        self.end()
        self._begun_at = step
        for one in map(_stepping, all_objects(self._objects)):
            if isinstance(one, Optimizer) and one not in self._hooks:
                begins = one.register_step_pre_hook(self._step_begins)
                self._hooks[one] = begins, one.register_step_post_hook(self._step_is_over)

    def after_a_step(
        self,
        step: int,
        group: Group,
        values: Callable[[], Any],
        layout: Callable[[Mapping[str, object]], Layout],
    ) -> None:
        """Look at everything, unless that was done; called between two steps.

        Args:
            step: Completed steps.
            group: The ranks, each of which calls this.
            values: Returns what would be saved with the objects.
            layout: How the folder would look.

        Raises:
            CaptureError: Something cannot be stored.
            RankError: That happened on another rank.
        """
        if not self._waits(step):
            return
        self.end()

        def look() -> None:
            self._look(values())
            described = layout(self._objects)
            if group.rank == 0:
                described.files()

        group.run_on_all("capture the state", look)

    def note_saved(self, step: int) -> None:
        """Note a save, which has looked at everything: no further look is needed."""
        if self._waits(step):
            self.end()

    def _waits(self, step: int) -> bool:
        return self._begun_at is not None and step > self._begun_at

    def end(self) -> None:
        """Look no more: the run is over."""
        self._begun_at = None
        for one in list(self._hooks):
            self._let_go(one)

    def _look(self, values: Any = None, *, call_state_dict: bool = True) -> None:
        tree = capture(self._objects, call_state_dict=call_state_dict)
        refuse_what_cannot_be_stored({**tree, "values": values})

    def _step_begins(self, optimizer: Optimizer, *_: Any) -> None:
        self._open[optimizer] += 1  # torch calls hooks again for a step that calls super().step

    def _step_is_over(self, optimizer: Optimizer, *_: Any) -> None:
        self._open[optimizer] -= 1
        if self._open[optimizer] <= 0 and not torch.compiler.is_compiling():
            self._let_go(optimizer)
            self._look(call_state_dict=False)

    def _let_go(self, optimizer: Optimizer) -> None:
        for hook in self._hooks.pop(optimizer, ()):
            hook.remove()
        self._open.pop(optimizer, None)


def _stepping(value: object) -> object:
    """Return the optimizer in a wrapper that has no hooks of its own, as accelerate's has none."""
    is_face = isinstance(value, Optimizer) and not hasattr(value, "_optimizer_step_pre_hooks")
    return getattr(value, "optimizer", value) if is_face else value
