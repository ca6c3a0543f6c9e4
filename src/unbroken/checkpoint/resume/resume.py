"""Resuming: choose a checkpoint, put it into the objects, and clear the way for what follows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from unbroken.capture import (
    Growth,
    capture,
    check,
    check_rng,
    classes_at_hand,
    decode,
    fill,
    load_tensors,
    missing_devices,
    of_devices_here,
    restore_rng,
    structure_from_bytes,
    types_in,
)
from unbroken.changes.compare import Comparison
from unbroken.changes.differences import Difference, ResumeReport, by_severity
from unbroken.checkpoint.coverage.attributes import NAME, Attributes
from unbroken.checkpoint.coverage.schedules import FoundSchedules
from unbroken.checkpoint.coverage.unregistered import of_checkpoint
from unbroken.checkpoint.ddp_buckets import DdpBuckets
from unbroken.checkpoint.resume.per_rank import (
    facts_of_rank,
    from_rank_0,
    reseed_rank,
    state_of_rank,
    with_own_modes,
)
from unbroken.checkpoint.resume.readers import ReadAhead, Readers, ReadFrom, Source
from unbroken.checkpoint.resume.selection import (
    Candidate,
    DamagedCandidateError,
    Origin,
    Selection,
    origin_in,
)
from unbroken.checkpoint.save.rank_shares import MODES, STATE_FILE
from unbroken.checkpoint.save.session import refuse_torn
from unbroken.checkpoint.save.staging import flattened
from unbroken.checkpoint.save.unfinished_gradients import GRADIENTS, UnfinishedGradients
from unbroken.distributed import Group
from unbroken.errors import CheckpointError, CorruptCheckpointError
from unbroken.store import CheckpointReader, Json, Rejection, RunDirectory
from unbroken.store.run.catalog import belongs_to
from unbroken.store.run.directory import as_directory_error, now_as_text


@dataclass(frozen=True)
class _Examined:
    """A checkpoint of which all was checked but the bytes of what is filled in place."""

    reader: Source
    objects: Mapping[str, object]
    tree: Mapping[str, Any]
    rng: Mapping[str, Any]
    values: Any
    gradients: Mapping[str, Any]


@dataclass(frozen=True)
class _Classes:
    """The classes that a state may name: those that were given, and those of what is here.

    What is here is captured when the first of them is asked for: most states name none, and a
    `state_dict` of the user's is not called before it is needed.
    """

    given: tuple[type, ...]
    objects: Mapping[str, object]

    def __iter__(self) -> Iterator[type]:
        yield from self.given
        yield from {*types_in(capture(self.objects)), *classes_at_hand(flattened(self.objects))}


@dataclass(frozen=True)
class Resumed:
    """What a resume has brought back besides the objects.

    Attributes:
        report: What was found and done.
        values: The plain values of the checkpoint, or None.
        best_step: The best step that it knew, or None.
        facts: What else it was made with.
        origin: Facts of the checkpoint of another run in which this run began.
        skipped: Patterns of what this run did not load when it began.
    """

    report: ResumeReport
    values: Any
    best_step: int | None
    facts: Mapping[str, Any]
    origin: Origin
    skipped: tuple[str, ...]


_BESIDE = ("rng", "values", NAME, GRADIENTS, MODES)
"""What of the state is of no registered object."""


class Resumption:
    """One attempt to bring a run's objects back; used once by `Checkpointer.resume`.

    Args:
        run: The open run directory.
        objects: The live objects, by name.
        types: Classes of namedtuples and enums inside the state.
        comparison: What this start is; None: whatever the checkpoint was made with is fine.
        found: Schedules among the objects that were not given.
        unfinished: Gets the gradients of an unfinished step back.
        notes: What else the report says.
        group: The ranks that resume together: rank 0 chooses, all load, all must succeed.
        read_from: Which of them read the checkpoint.
        per_rank: Names of what each rank gets back its own of; None: of all that was stored so.
        apart: More such names, of which further ranks get rank 0's.
        may_choose: Whether the caller can say `per_rank`.
        ahead: What was read of the checkpoint before.
        buckets: How `DistributedDataParallel` adds gradients; None: it is not compared.
        attributes: What training makes of attributes of the user's own objects.
        is_torn: Whether an attempt before has left the objects with parts of a checkpoint.
        readers: How the ranks open and load a checkpoint.
        clock: Seconds since 1970.

    Attributes:
        is_torn: Whether the objects hold parts of a checkpoint, and no whole one.
    """

    def __init__(
        self,
        run: RunDirectory,
        objects: Mapping[str, object],
        types: tuple[type, ...],
        comparison: Comparison | None = None,
        *,
        found: FoundSchedules | None = None,
        unfinished: UnfinishedGradients | None = None,
        notes: tuple[str, ...] = (),
        group: Group,
        readers: Readers,
        read_from: ReadFrom = "all",
        per_rank: Collection[str] | None = None,
        apart: Collection[str] = (),
        may_choose: bool = True,
        ahead: ReadAhead | None = None,
        attributes: Attributes | None = None,
        buckets: DdpBuckets | None = None,
        is_torn: bool = False,
        clock: Callable[[], float],
    ) -> None:
        self._values: Any = None
        self.is_torn = is_torn
        self._examined: _Examined | None = None
        self._best_step: int | None = None
        self._run = run
        self._group = group
        self._ahead = ahead
        self._attributes = attributes
        self._buckets = buckets
        self._readers = readers
        self._per_rank = per_rank
        self._apart, self._may_choose = apart, may_choose
        self._of_other_ranks: tuple[Difference, ...] = ()
        self._read_from = read_from
        self._clock = clock
        self._reseeds_rank = False
        self._is_beginning = False
        self._notes = notes
        self._objects = objects
        self._types = types
        self._facts: Mapping[str, Any] = {}
        self._origin: Origin = {}
        self._skipped: tuple[str, ...] = ()
        self._comparison = comparison
        self._found = found
        self._given_since: list[str] = []
        self._growth = Growth(objects)
        self._unfinished = unfinished
        self._differences: tuple[Difference, ...] = ()
        self._agreed: tuple[Difference, ...] = ()
        self._same: tuple[Difference, ...] = ()

    def start(self, candidate: Candidate, *, passes_over: bool) -> Resumed:
        """Go on from a candidate, or make ready for a fresh start.

        Args:
            candidate: The checkpoint; none: a fresh start.
            passes_over: Whether the next one takes the place of one that is damaged; else that is
                told by a `DamagedCandidateError`.
        """
        while candidate.source is not None:
            try:
                damage = self._readers.load(partial(self._examine, candidate.source))
                if damage is None:  # on every rank: only now does one of them change something
                    damage = self._readers.load(self._fill)
            finally:
                self._growth.take_back()  # what has got its shape from here, and nothing more
            if damage is None:
                self._origin = candidate.origin or origin_in(candidate.source.manifest.facts)
                break
            older = candidate.after(damage)
            if not passes_over:
                raise DamagedCandidateError(damage, older)
            candidate = older
        else:
            refuse_torn(self._run, is_torn=self.is_torn)
        report = self._begun_together(candidate.selection, candidate.source, candidate.rejected)
        return Resumed(
            report, self._values, self._best_step, self._facts, self._origin, self._skipped
        )

    def _begun_together(
        self, selection: Selection, reader: Source | None, rejected: tuple[Rejection, ...]
    ) -> ResumeReport:
        """Let rank 0 clear the way; every rank has its own differences."""
        group = self._group
        self._agreed = from_rank_0(group, self._differences)

        def begin() -> ResumeReport | None:
            with as_directory_error(self._run.storage):
                return self._clear_the_way(selection, reader, rejected)

        report = group.run_on_all("begin", begin if group.rank == 0 else lambda: None)
        if report is not None:
            return report
        checkpoint = None if reader is None else reader.storage.describe(reader.folder)
        step = 0 if reader is None else reader.step
        return ResumeReport(
            step, checkpoint, rejected, differences=self._differences, same=self._same
        )

    def refuse_beginning(self, source: Source) -> None:
        """Raise if a branch that begins in a checkpoint would not be gone on with."""
        self._is_beginning = True
        try:
            damage = self._readers.load(partial(self._examine, source))
        finally:
            self._growth.take_back()
        if damage is not None:
            raise damage

    def load_only(self, source: Source) -> None:
        """Fill these objects alone from a checkpoint."""
        own: dict[str, Any] = {}

        def look() -> None:
            tree = self._tree(source)
            own.update({name: tree[name] for name in self._objects})
            self._growth = Growth(self._objects, partial(self._is_as_built, source))
            self._growth.grow(own)  # they may have grown since
            check(self._objects, own)

        try:
            damage = self._readers.load(look)
            damage = damage or self._readers.load(lambda: fill(self._objects, own))
            if damage is not None:
                raise damage
            self._growth.keep()
        finally:
            self._growth.take_back()

    def _examine(self, reader: Source) -> None:
        """Read and check all that can be, and change nothing."""
        self._check_journals()
        tree = self._tree(reader)
        moved = tree.pop(NAME, None)
        rng, values = load_tensors(tree.pop("rng"), "cpu"), load_tensors(tree.pop("values"))
        if self._comparison is not None:
            self._comparison.check_values(values)
        waiting = tree.pop(GRADIENTS, None)
        tree, objects, differences = self._fitting(reader, tree)
        self._growth = Growth(objects, partial(self._is_as_built, reader))
        check_rng(rng, allow_missing_devices=self._comparison is not None)
        differences = (*differences, *_of_devices(rng), *self._of_other_ranks)
        tree = self._compared(reader, tree, differences, moved)
        check(objects, tree)
        gradients = {} if self._unfinished is None else self._unfinished.check(waiting)
        rng = of_devices_here(rng)
        if self._is_own(reader):
            _metrics_bytes(reader)
        self._examined = _Examined(reader, objects, tree, rng, values, gradients)

    def _check_journals(self) -> None:
        if self._group.rank == 0 and not self._run.is_readonly:
            self._run.metrics.check()
            self._run.history.check()

    def _fill(self) -> None:
        """Fill the objects with what was examined; the random generators last."""
        found = self._examined
        if found is None:
            raise RuntimeError("nothing was examined")
        self.is_torn = True
        fill(found.objects, found.tree)
        self._growth.keep()
        if self._attributes is not None:
            self._attributes.restore()
            self._attributes.take_effect(self._differences)
        if self._unfinished is not None:
            self._unfinished.restore(found.gradients)
        if self._comparison is not None:
            self._comparison.take_effect(self._differences)
        restore_rng(found.rng)
        if self._reseeds_rank:
            reseed_rank(found.rng, self._group.rank)
        found.reader.check_rest()
        self.is_torn = False
        self._values = found.values
        self._remember(found.reader.manifest.facts)

    def _fitting(
        self, reader: Source, tree: dict[str, Any]
    ) -> tuple[dict[str, Any], Mapping[str, object], tuple[Difference, ...]]:
        """Return what is stored and here, now that schedules were found that were not given."""
        if self._found is None:
            return tree, self._objects, ()
        facts = reader.manifest.facts
        known = facts.get("found")
        skipped = () if self._comparison is None else self._comparison.skipped
        fit = self._found.fit(tree, known if isinstance(known, Mapping) else {}, skipped)
        tree, objects, differences = fit
        missing = of_checkpoint(facts)
        self._given_since = [name for name in objects if missing and name not in tree]
        objects = {name: one for name, one in objects.items() if name not in self._given_since}
        return tree, objects, (*differences, *missing)

    def _is_as_built(self, reader: Source, path: str) -> bool:
        """Tell whether an object was built as the one was that made the checkpoint."""
        built = reader.manifest.facts.get("built")
        comparison = self._comparison
        if comparison is None or not isinstance(built, dict):  # an older version did not note it
            return False
        return bool(built.get(path) == comparison.facts["built"].get(path))

    def _compared(
        self, reader: Source, tree: dict[str, Any], more: tuple[Difference, ...], moved: Any
    ) -> dict[str, Any]:
        """Return what is to be loaded; raise if it does not fit or is not accepted."""
        comparison, facts = self._comparison, reader.manifest.facts
        if comparison is None:
            self._growth.grow(tree)
            return tree
        place = self._group.rank, self._group.world_size
        facts = facts_of_rank(facts, comparison.facts, *place)
        sums = () if self._buckets is None else self._buckets.differences(facts)
        rows = comparison.rows(facts, sums)
        found = tuple(row for row in rows if row.verdict != "same")
        count = len(found)
        found = tuple(row for row in found if not self._is_of_what_was_given_since(row))
        rows = rows[count:]
        reported = {row.path for row in found}
        found = by_severity((*found, *(one for one in more if one.path not in reported)))
        if self._attributes is not None:
            moved_on = self._attributes.differences(moved, found)
            found = by_severity((*found, *moved_on))
        found = by_severity((*found, *comparison.came_or_went(tree)))
        is_here = reader.storage is self._run.storage
        own = is_here and reader.manifest.run_id == self._run.run_id  # not its parent's
        own = own and not self._is_beginning
        patterns = comparison.patterns(facts, own=own)
        tree, skipped = comparison.partial(tree, patterns, found)
        self._growth.grow(tree)
        model = {name: self._objects[name] for name in ("model",) if name in self._objects}
        check(model, {name: tree[name] for name in model if name in tree})  # names both shapes
        comparison.refuse(f"checkpoint of step {reader.step}", found)
        comparison.accept(found)
        self._differences = (*skipped, *found)
        self._same = rows
        self._skipped = patterns
        return tree

    def _is_of_what_was_given_since(self, row: Difference) -> bool:
        """Return whether a row tells only that an object came, which is told otherwise."""
        is_of = (f".{name}." in f".{row.path}." for name in self._given_since)
        return row.stored is None and any(is_of)

    def _tree(self, reader: Source) -> dict[str, Any]:
        tree = self._decoded(reader, STATE_FILE)
        if not {"rng", "values"} <= tree.keys():
            expected, found = "rng and values among them", sorted(map(str, tree))
            raise CorruptCheckpointError(reader.folder, STATE_FILE, expected=expected, found=found)
        requested = {n: v for n, v in tree.items() if n in _BESIDE or n in self._objects}
        own, self._reseeds_rank, self._of_other_ranks = state_of_rank(
            requested,
            reader.manifest,
            self._group,
            self._per_rank,
            partial(self._decoded, reader),
            alike=self._read_from == "rank0",
            apart=self._apart,
            may_choose=self._may_choose,
        )
        return with_own_modes({**tree, **own})

    def _decoded(self, reader: Source, name: str) -> dict[str, Any]:
        structure = structure_from_bytes(reader.read_file(name), name)
        source = reader if self._ahead is None else self._ahead.of(reader)
        tree = decode(structure, source, types=_Classes(self._types, self._objects), lazy=True)
        if not isinstance(tree, dict):
            raise CorruptCheckpointError(
                reader.folder, name, expected="objects by name", found=type(tree).__name__
            )
        return tree

    def _remember(self, facts: Mapping[str, Any]) -> None:
        self._facts = facts
        self._best_step = facts.get("best_step")
        before = facts.get("skip")
        texts = [one for one in before if isinstance(one, str)] if isinstance(before, list) else []
        self._skipped = tuple(dict.fromkeys([*texts, *self._skipped]))

    def _clear_the_way(
        self, selection: Selection, reader: Source | None, rejected: tuple[Rejection, ...]
    ) -> ResumeReport:
        """Set aside what belongs to another future, cut the metrics, and tell the history."""
        self._check_journals()
        own = reader is not None and self._is_own(reader)
        step = 0 if reader is None else reader.step
        moved = tuple(
            (folder, self._run.catalog.set_aside(later, f"a run from step {step} began"))
            for later, folder in self._run.catalog.folders()
            if self._goes(later, folder, reader, own=own)
        )
        known = _metrics_bytes(reader) if reader is not None and own else 0
        follows = own and selection.kind in ("auto", "begun")
        notes = self._cut_metrics(known, step, keep_copy=not follows)
        notes = (*_notes_on(selection, reader, self._run, own=own), *notes)
        report = ResumeReport(
            step=step,
            checkpoint=None if reader is None else reader.storage.describe(reader.folder),
            rejected=rejected,
            set_aside=moved,
            previous_owner=self._run.previous_owner,
            differences=self._agreed,
            same=self._same,
            notes=(*self._notes, *notes),
        )
        started = {"event": "started", "at": now_as_text(self._clock)}
        self._run.history.append({**started, **report.to_json()})
        return report

    def _is_own(self, reader: Source) -> bool:
        """Return whether the run wrote a checkpoint, or took it over as a branch."""
        run, manifest = self._run, reader.manifest
        return reader.storage is run.storage and belongs_to(manifest, run.run_id, run.parent)

    def _goes(self, step: int, folder: str, reader: Source | None, *, own: bool) -> bool:
        """Return whether a checkpoint is of another future than what comes after `reader`."""
        if reader is None or reader.storage is not self._run.storage:
            return True
        if own:
            return step > reader.step
        if folder == reader.folder:
            return False
        try:  # this run begins in a checkpoint that was copied here; older copies stay beside it
            found = CheckpointReader(self._run.storage, folder)
        except CheckpointError:
            return True
        return self._run.catalog.is_own(found) or step > reader.step

    def _cut_metrics(self, nbytes: int, step: int, *, keep_copy: bool) -> tuple[str, ...]:
        """Cut metrics.jsonl back to what it was at the checkpoint."""
        metrics = self._run.metrics
        notes: tuple[str, ...] = ()
        if not metrics.ends_at(nbytes):  # somebody has shortened, edited or removed it
            was = f"{nbytes} bytes then, {metrics.nbytes} now"
            what = f"metrics.jsonl is not what it was when the checkpoint was saved ({was})"
            notes = (f"{what}: the run goes on with the lines that are left",)
            nbytes, keep_copy = metrics.end_before(lambda line: _is_after(step, line)), True
        if metrics.nbytes == nbytes:
            return notes
        copy = self._run.set_aside_metrics() if keep_copy else None
        metrics.cut(nbytes)
        if copy is None:
            return notes
        return (*notes, f"set aside: the old metrics.jsonl is now {copy}")


def _is_after(step: int, line: Mapping[str, Json]) -> bool:
    """Return whether a line of metrics is of a later step."""
    found = line.get("step")
    return isinstance(found, int | float) and found > step


def _of_devices(rng: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Tell of random states that no device here can take."""
    missing = missing_devices(rng)
    if missing is None:
        return ()
    where, stored, now = missing
    effect = "devices: what draws on them draws otherwise from here on"
    return (Difference(where, stored, now, effect, "changed"),)


def _metrics_bytes(reader: Source) -> int:
    """Return how long metrics.jsonl was when a checkpoint was saved."""
    found = reader.manifest.facts.get("metrics_bytes")
    if type(found) is not int or found < 0:
        where = f"{reader.folder}: manifest.json"
        raise CorruptCheckpointError(where, "facts.metrics_bytes", expected="bytes", found=found)
    return found


def _notes_on(
    selection: Selection, reader: Source | None, run: RunDirectory, *, own: bool
) -> tuple[str, ...]:
    """Say where a run began, where that is not what the selection says by itself."""
    if selection.kind == "begun":
        goes_on = "it goes on from its own newest checkpoint"
        return (f"this run began in {selection.path}: {goes_on}; another directory begins anew",)
    if reader is None or own or reader.storage is not run.storage:
        return ()
    return (f"{reader.folder} is of run {reader.manifest.run_id}: this run begins in it",)
