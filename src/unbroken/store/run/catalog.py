"""The checkpoints of a run: listed, opened, set aside, kept or removed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from unbroken.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    NewerFormatError,
)
from unbroken.storage import Storage
from unbroken.store.checkpoint.commit import (
    ensure_folder,
    free_name,
    move_durably,
    names_in,
    remove_checkpoint,
    settle_replaced,
)
from unbroken.store.checkpoint.reader import CheckpointReader, VerifiedCache
from unbroken.store.format.canonical_json import Fields, Json, MalformedError, is_digest
from unbroken.store.format.manifest import Manifest
from unbroken.store.format.names import (
    MANIFEST_NAME,
    MAX_STEP,
    PINNED_NAME,
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
        for name in names_in(self._storage, SET_ASIDE):
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

    def newest_that_opens(self) -> tuple[CheckpointReader | None, tuple[Rejection, ...]]:
        """Return the newest checkpoint whose manifest is right; its tensors are not verified.

        Returns:
            Its reader, or None if there is none; and the newer ones that were rejected.

        Raises:
            NewerFormatError: As `newest_first`.
        """
        rejections: list[Rejection] = []
        for candidate in self.newest_first():
            if isinstance(candidate, CheckpointReader):
                return candidate, tuple(rejections)
            rejections.append(candidate)
        return None, tuple(rejections)

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


# Which checkpoints stay; the others are removed.
#
# Nothing goes unless enough newer checkpoints were read whole and are good. What unbroken did
# not make, it does not remove.


@dataclass(frozen=True)
class KeepEvery:
    """Keep the checkpoint of every so many steps, up to a step.

    Source: `CheckpointInterval` of Levanter.

    Attributes:
        every: Checkpoints whose step is a multiple of it are kept.
        until: The last step for which it holds; None: for ever.

    Raises:
        ConfigError: One of them is not positive.

    Example:
        >>> KeepEvery(every=1000, until=10_000).every
        1000
    """

    every: int
    until: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError("KeepEvery.every", "must be at least 1", found=self.every)
        if self.until is not None and self.until < 1:
            raise ConfigError("KeepEvery.until", "must be at least 1", found=self.until)


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints stay. One that any rule keeps, stays.

    Beside these rules, the best steps that `prune` is told stay, and every checkpoint in whose
    folder a file called "pinned" stands.

    Attributes:
        last: How many of the newest intact ones (`save_total_limit`); None: all.
        every: Intervals by rising `until`; for a step, the first that reaches it holds.

    Raises:
        ConfigError: `last` is not positive, or the intervals do not rise.

    Example:
        >>> policy = KeepPolicy(last=2, every=(KeepEvery(1000, until=10_000), KeepEvery(5000)))
        >>> [policy.keeps_step(step) for step in (1500, 3000, 13_000, 15_000)]
        [False, True, False, True]
    """

    last: int | None = None
    every: tuple[KeepEvery, ...] = ()

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise ConfigError("KeepPolicy.last", "must be at least 1, or None", found=self.last)
        ends = [interval.until for interval in self.every]
        known = [end for end in ends if end is not None]
        if None in ends[:-1] or known != sorted(set(known)):
            raise ConfigError(
                "KeepPolicy.every", "must have rising `until`, only the last None", found=ends
            )

    def keeps_step(self, step: int) -> bool:
        """Return whether an interval keeps the checkpoint of `step`."""
        for interval in self.every:
            if interval.until is None or step <= interval.until:
                return step % interval.every == 0
        return False


@dataclass(frozen=True)
class Pruned:
    """What `prune` did.

    Attributes:
        removed: The folders that went, the newest first.
        kept: The folders that stayed, the newest first.
        reasons: Why each that stayed did: "last", "interval", "best", "pinned", or a sentence.

    Example:
        >>> Pruned((), ("checkpoint-10",), {"checkpoint-10": "last"}).removed
        ()
    """

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    reasons: Mapping[str, str]


def prune(
    storage: Storage,
    policy: KeepPolicy,
    *,
    run_id: str,
    parent: Lineage | None = None,
    best_steps: Collection[int] = frozenset(),
    verified: VerifiedCache,
) -> Pruned:
    """Remove the checkpoints that no rule keeps. Call it after a commit, never before one.

    Only checkpoints that were read whole and are good count as kept; a damaged one is never
    counted and never removed. If the newest is damaged, or fewer than `policy.last` are good,
    nothing goes. Checkpoints of other runs, and folders that hold a file which the manifest
    does not list, are left alone.

    Args:
        storage: The run directory, whose lock the caller holds.
        policy: The rules.
        run_id: The run whose checkpoints may go.
        parent: Where it comes from: the checkpoints that it took over from there may go too,
            and stay where they were taken from.
        best_steps: Steps that stay.
        verified: What this process has read already.

    Raises:
        OSError: The storage fails; each checkpoint is whole or gone.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointWriter
        >>> storage = MemoryStorage()
        >>> for step in (1, 2, 3):
        ...     manifest = CheckpointWriter(storage, step=step, run_id="a" * 32).commit({})
        >>> prune(storage, KeepPolicy(last=2), run_id="a" * 32, verified=VerifiedCache()).removed
        ('checkpoint-1',)
    """
    pruning = _Pruning(storage, policy, run_id, parent, best_steps, verified)
    for step, folder in reversed(Catalog(storage).folders()):
        reason = pruning.reason_to_keep(step, folder)
        if reason is None:
            remove_checkpoint(storage, folder)
            pruning.removed.append(folder)
        else:
            pruning.reasons[folder] = reason
    return Pruned(tuple(pruning.removed), tuple(pruning.reasons), pruning.reasons)


@dataclass
class _Pruning:
    """One walk from the newest checkpoint to the oldest."""

    storage: Storage
    policy: KeepPolicy
    run_id: str
    parent: Lineage | None
    best_steps: Collection[int]
    verified: VerifiedCache
    good: int = 0
    is_newest_damaged: bool = False
    removed: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def reason_to_keep(self, step: int, folder: str) -> str | None:
        """Return why a checkpoint stays, or None if it may go. Cheap reasons come first."""
        if self.policy.last is None:
            return "all are kept"
        if step_of(folder) is None:
            return "it is being replaced"
        try:
            reader = CheckpointReader(self.storage, folder)
        except CheckpointError as error:
            return self._damaged(str(error))
        is_own = belongs_to(reader.manifest, self.run_id, self.parent)
        if not is_own or reader.step != step:
            return "it belongs to another run or step"
        return self._reason_of_own(reader)

    def _reason_of_own(self, reader: CheckpointReader) -> str | None:
        needs_good = self.policy.last is None or self.good < self.policy.last
        by_rule = self._rule_for(reader)
        if by_rule is not None and not needs_good:
            return by_rule
        problem = self.verified.problem_of(reader)
        if problem is not None:
            return self._damaged(problem)
        if needs_good:
            self.good += 1
            return "last"
        return self._reason_to_spare(reader)

    def _rule_for(self, reader: CheckpointReader) -> str | None:
        if self.policy.keeps_step(reader.step):
            return "interval"
        if reader.step in self.best_steps:
            return "best"
        pinned = self.storage.stat(f"{reader.folder}/{PINNED_NAME}")
        return None if pinned is None else "pinned"

    def _reason_to_spare(self, reader: CheckpointReader) -> str | None:
        if self.is_newest_damaged:
            return "the newest checkpoint is damaged"
        listed = {MANIFEST_NAME, *(file.name for file in reader.manifest.files)}
        strays = sorted(set(self.storage.list(reader.folder)) - listed)
        return f"it holds {strays[0]}, which is not in its manifest" if strays else None

    def _damaged(self, problem: str) -> str:
        if self.good == 0:
            self.is_newest_damaged = True
        return f"it is damaged ({problem})"
