"""Resuming: choose a checkpoint, put it into the objects, and clear the way for what follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from unbroken.capture import (
    capture,
    check,
    decode,
    load_tensors,
    restore,
    restore_rng,
    structure_from_bytes,
    types_in,
)
from unbroken.checkpoint.comparison import Comparison
from unbroken.checkpoint.differences import Difference
from unbroken.checkpoint.report import ResumeReport
from unbroken.checkpoint.selection import Selection
from unbroken.distributed import Group
from unbroken.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    RankError,
    RunDirectoryError,
    UnbrokenError,
)
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, Json, Rejection, RunDirectory

STATE_FILE = "state.json"


class Resumption:
    """One attempt to bring a run's objects back; used once by `Checkpointer.resume`.

    Args:
        run: The open run directory.
        objects: The live objects, by name.
        types: Classes of namedtuples and enums inside the state.
        comparison: What this start is; None: whatever the checkpoint was made with is fine.
        notes: What else the report says.
        group: The ranks that resume together: rank 0 chooses, all load, all must succeed.

    Attributes:
        values: The plain values of the resumed checkpoint, or None.
        best_step: The best step that it knew, or None.
        origin: The folder outside the run directory from which this run began, or None.
        skipped: Patterns of what this run did not load when it began.
    """

    def __init__(
        self,
        run: RunDirectory,
        objects: Mapping[str, object],
        types: tuple[type, ...],
        comparison: Comparison | None = None,
        *,
        notes: tuple[str, ...] = (),
        group: Group,
    ) -> None:
        self.values: Any = None
        self.best_step: int | None = None
        self.origin: str | None = None
        self._run = run
        self._group = group
        self._notes = notes
        self._objects = objects
        self._types = types
        self.skipped: tuple[str, ...] = ()
        self._comparison = comparison
        self._differences: tuple[Difference, ...] = ()

    def start(self, selection: Selection) -> ResumeReport:
        """Resume what `selection` asks for, or make ready for a fresh start."""
        rejected: list[Rejection] = []
        reader = None
        for candidate in self._chosen_together(selection):
            if isinstance(candidate, Rejection):
                rejected.append(candidate)
                continue
            damage = self._load_together(candidate)
            if damage is None:
                reader = candidate
                break
            if selection.kind in ("step", "path", "best"):
                raise damage
            rejected.append(Rejection(candidate.folder, candidate.step, str(damage)))
        self._refuse_nothing_found(selection, reader, rejected)
        return self._begun_together(selection, reader, tuple(rejected))

    def _chosen_together(self, selection: Selection) -> Iterator[CheckpointReader | Rejection]:
        """Yield what rank 0 chooses, as every rank sees it."""
        group, own = self._group, iter(self._candidates(selection))
        if group.rank > 0:
            own = iter(())
        while True:
            found = group.together("choose a checkpoint", lambda: next(own, None))
            said = group.share("the checkpoint", described(found))
            if said is None:
                return
            see = partial(self._seen, found, said)
            seen = group.together("open the checkpoint", see)
            if isinstance(seen, CheckpointReader):
                group.agree("the state of the checkpoint", seen.manifest.state_digest)
            yield seen

    def _seen(
        self, found: CheckpointReader | Rejection | None, said: Any
    ) -> CheckpointReader | Rejection:
        """Return what rank 0 found, as this rank sees it."""
        if found is not None:
            return found
        if "reason" in said:
            return Rejection(said["folder"], said["step"], said["reason"])
        here = self._run.storage
        storage = here if said["place"] == here.describe() else LocalStorage(said["place"])
        return CheckpointReader(storage, said["folder"])

    def _load_together(self, reader: CheckpointReader) -> CorruptCheckpointError | None:
        """Load on every rank; return the damage that one of them found.

        Raises:
            UnbrokenError: What failed on this rank for another reason.
            RankError: It failed on another one.
        """
        error: UnbrokenError | None = None
        try:
            self._load(reader)
        except UnbrokenError as caught:
            error = caught
        damaged = type(error) is CorruptCheckpointError
        said: Any = None if error is None else [damaged, str(error)]
        ranks: list[Any] = self._group.gather("load", said)
        failed = {rank: one for rank, one in enumerate(ranks) if one is not None}
        if not failed:
            return None
        if isinstance(error, CorruptCheckpointError) and self._group.world_size == 1:
            return error
        if all(is_damage for is_damage, _ in failed.values()):
            rank, (_, text) = next(iter(failed.items()))
            return CorruptCheckpointError(f"rank {rank}", text)
        if error is not None:
            raise error
        rank, (_, text) = next(iter(failed.items()))
        raise RankError(f"rank {rank}", f"could not resume: {text}")

    def _begun_together(
        self, selection: Selection, reader: CheckpointReader | None, rejected: tuple[Rejection, ...]
    ) -> ResumeReport:
        """Let rank 0 clear the way; every rank has its own differences."""
        group = self._group
        report = group.together(
            "begin",
            lambda: self._clear_the_way(selection, reader, rejected) if group.rank == 0 else None,
        )
        if report is not None:
            return report
        checkpoint = None if reader is None else reader.storage.describe(reader.folder)
        step = 0 if reader is None else reader.step
        return ResumeReport(step, checkpoint, rejected, differences=self._differences)

    def load_only(self, step: int) -> None:
        """Fill these objects alone from the checkpoint of `step`."""
        tree = self._tree(self._at_step(step))
        restore(self._objects, {name: tree[name] for name in self._objects})

    def _candidates(self, selection: Selection) -> Iterator[CheckpointReader | Rejection]:
        catalog = self._run.catalog
        if selection.kind in ("auto", "must"):
            yield from catalog.newest_first()
        elif selection.kind == "step" and selection.step is not None:
            yield self._at_step(selection.step)
        elif selection.kind == "best":
            yield self._at_step(self._best_step())
        elif selection.kind == "path" and selection.path is not None:
            yield from self._at_path(selection.path)

    def _at_step(self, step: int) -> CheckpointReader:
        folders = self._run.catalog.folders()
        if step not in dict(folders):
            raise CheckpointNotFoundError(
                self._run.storage.describe(),
                "no such checkpoint",
                expected=f"one of the steps {[known for known, _ in folders]}",
                found=step,
            )
        return self._run.catalog.open(step)

    def _best_step(self) -> int:
        step = self._run.catalog.best_step()
        if step is None:
            raise CheckpointNotFoundError(
                self._run.storage.describe(), "no checkpoint knows which one is the best"
            )
        return step

    def _at_path(self, path: Path) -> Iterator[CheckpointReader | Rejection]:
        """Yield the checkpoint at `path`; but a run that already began there goes on instead."""
        folder = path.resolve()
        if folder.parent == Path(self._run.storage.describe()).resolve():
            yield CheckpointReader(self._run.storage, folder.name)
            return
        if not (folder / "manifest.json").exists():
            raise CheckpointNotFoundError(
                str(path),
                "is no checkpoint",
                expected="a folder with a manifest.json",
                hint="of a run directory, name one of its checkpoints",
            )
        origin = str(folder)
        for candidate in self._run.catalog.newest_first():
            if isinstance(candidate, Rejection) or candidate.manifest.facts.get("origin") == origin:
                yield candidate
        self.origin = origin
        yield CheckpointReader(LocalStorage(folder.parent), folder.name)

    def _load(self, reader: CheckpointReader) -> None:
        """Fill the objects, after all that can be checked was; the random generators last."""
        tree = self._compared(reader, self._tree(reader))
        rng, values = tree.pop("rng"), tree.pop("values")
        restore(self._objects, tree)
        self.values = load_tensors(values)
        if self._comparison is not None:
            self._comparison.take_effect(self._differences)
        restore_rng(load_tensors(rng))
        reader.check_rest()
        self._remember(reader.manifest.facts)

    def _compared(self, reader: CheckpointReader, tree: dict[str, Any]) -> dict[str, Any]:
        """Return what is to be loaded; raise if it does not fit or is not accepted."""
        comparison, facts = self._comparison, reader.manifest.facts
        if comparison is None:
            return tree
        found = comparison.differences(facts)
        is_here = reader.storage is self._run.storage
        own = is_here and reader.manifest.run_id == self._run.run_id  # not its parent's
        patterns = comparison.patterns(facts, own=own)
        tree, skipped = comparison.partial(tree, patterns, found)
        model = {name: self._objects[name] for name in ("model",) if name in self._objects}
        check(model, {name: tree[name] for name in model if name in tree})  # names both shapes
        comparison.refuse(f"checkpoint of step {reader.step}", found)
        self._differences = (*skipped, *found)
        self.skipped = patterns
        return tree

    def _tree(self, reader: CheckpointReader) -> dict[str, Any]:
        structure = structure_from_bytes(reader.read_file(STATE_FILE), STATE_FILE)
        types = (*self._types, *types_in(capture(self._objects)))
        tree = decode(structure, reader, types=types, lazy=True)
        if not isinstance(tree, dict):
            raise CorruptCheckpointError(
                reader.folder, STATE_FILE, expected="objects by name", found=type(tree).__name__
            )
        return tree

    def _remember(self, facts: Mapping[str, Any]) -> None:
        self.best_step = facts.get("best_step")
        self.origin = self.origin or facts.get("origin")
        self.skipped = tuple(dict.fromkeys([*(facts.get("skip") or ()), *self.skipped]))

    def _refuse_nothing_found(
        self, selection: Selection, reader: CheckpointReader | None, rejected: list[Rejection]
    ) -> None:
        if reader is not None or selection.kind == "never":
            return
        if rejected:
            raise CheckpointNotFoundError(
                self._run.storage.describe(),
                "not one checkpoint is intact",
                found="; ".join(f"{item.folder}: {item.reason}" for item in rejected),
                hint="`unbroken verify` lists all damage; "
                'resume_from_checkpoint="never" starts anew',
            )
        if selection.kind == "must" or self._run.parent is not None:
            raise CheckpointNotFoundError(
                self._run.storage.describe(),
                "no checkpoint to resume",
                hint='"auto" starts a new run where there is none, but never a branch',
            )

    def _clear_the_way(
        self, selection: Selection, reader: CheckpointReader | None, rejected: tuple[Rejection, ...]
    ) -> ResumeReport:
        """Set aside what belongs to another future, cut the metrics, and tell the history."""
        own = reader is not None and reader.storage is self._run.storage
        step = 0 if reader is None else reader.step
        moved = tuple(
            (folder, self._run.catalog.set_aside(later, f"a run from step {step} began"))
            for later, folder in self._run.catalog.folders()
            if not (own and later <= step)
        )
        known = reader.manifest.facts.get("metrics_bytes") if reader is not None and own else 0
        notes = self._cut_metrics(known, keep_copy=selection.kind != "auto")
        report = ResumeReport(
            step=step,
            checkpoint=None if reader is None else reader.storage.describe(reader.folder),
            rejected=rejected,
            set_aside=moved,
            previous_owner=self._run.previous_owner,
            differences=self._differences,
            notes=(*self._notes, *notes),
        )
        self._run.history.append({"event": "started", **report.to_json()})
        return report

    def _cut_metrics(self, nbytes: Json, *, keep_copy: bool) -> tuple[str, ...]:
        """Cut metrics.jsonl back to what it was at the checkpoint."""
        metrics = self._run.metrics
        if not isinstance(nbytes, int):
            raise CorruptCheckpointError("manifest.json", "facts.metrics_bytes", found=nbytes)
        if metrics.nbytes < nbytes:
            raise RunDirectoryError(
                self._run.storage.describe("metrics.jsonl"),
                "is shorter than when the checkpoint was saved",
                expected=f"at least {nbytes} bytes",
                found=f"{metrics.nbytes} bytes",
                hint="bring the file back from a backup, or resume by the path of a copy of the "
                "checkpoint in a new run directory",
            )
        if metrics.nbytes == nbytes:
            return ()
        copy = self._run.set_aside_metrics() if keep_copy else None
        metrics.cut(nbytes)
        return () if copy is None else (f"set aside: the old metrics.jsonl is now {copy}",)


def described(found: CheckpointReader | Rejection | None) -> Json:
    """Return what other ranks must know to see the same."""
    if found is None:
        return None
    if isinstance(found, Rejection):
        return {"folder": found.folder, "step": found.step, "reason": found.reason}
    return {"folder": found.folder, "place": found.storage.describe()}
