"""Decide which checkpoints stay, and remove the others.

Nothing goes unless enough newer checkpoints were read whole and are good. What unbroken did
not make, it does not remove.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from unbroken.errors import CheckpointError, ConfigError
from unbroken.storage import Storage
from unbroken.store.checkpoint.commit import remove_checkpoint
from unbroken.store.checkpoint.reader import CheckpointReader, VerifiedCache
from unbroken.store.format.names import MANIFEST_NAME, PINNED_NAME, step_of
from unbroken.store.run.catalog import Catalog, Lineage, belongs_to


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
