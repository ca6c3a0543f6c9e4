"""Resuming: a checkpoint is checked against this start, put into the objects, and gone on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from unbroken.capture import (
    Growth,
    NotTakenBack,
    all_objects,
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
from unbroken.changes.differences import Difference, ResumeReport, brief, by_severity
from unbroken.checkpoint.arguments import RankPolicy
from unbroken.checkpoint.coverage.attributes import ATTRIBUTES_KEY, Attributes
from unbroken.checkpoint.coverage.loop_watch import GRADIENTS, LoopWatch
from unbroken.checkpoint.coverage.unregistered import NOT_GIVEN_KEY, of_checkpoint
from unbroken.checkpoint.ddp_buckets import DdpBuckets
from unbroken.checkpoint.resume.per_rank import (
    facts_of_rank,
    from_rank_0,
    reseed_rank,
    state_of_rank,
    with_own_modes,
)
from unbroken.checkpoint.resume.readers import ReadAhead, Source
from unbroken.checkpoint.resume.selection import (
    Candidate,
    CandidateSelector,
    DamagedCandidateError,
    Origin,
    ResumeChoice,
    origin_in,
)
from unbroken.checkpoint.save.rank_shares import MODES
from unbroken.checkpoint.save.session import SaveLineage
from unbroken.errors import CheckpointError, CorruptCheckpointError
from unbroken.store import CheckpointReader, Json
from unbroken.store.format.names import STATE_FILE
from unbroken.store.run.directory import as_directory_error, now_as_text


@dataclass(frozen=True)
class ResumeRequest:
    """What this start is, and what it brings back.

    Attributes:
        comparison: The facts of this start, and the policy on differences.
        ranks: Which ranks read the checkpoint, and what each rank has of its own.
        types: Classes of namedtuples and enums inside the state.
        loop: What is looked for in a hand-written loop; None: the caller has given all.
        attributes: What training makes of attributes of the user's own objects.
        buckets: How `DistributedDataParallel` adds gradients; None: this process is alone.
        lineage: Learns whether the objects hold parts of a checkpoint, and no whole one.
        clock: Seconds since 1970.
        ahead: What was read of the checkpoint before.
        notes: What else the report says.
    """

    comparison: Comparison
    ranks: RankPolicy
    types: tuple[type, ...]
    loop: LoopWatch | None
    attributes: Attributes
    buckets: DdpBuckets | None
    lineage: SaveLineage
    clock: Callable[[], float]
    ahead: ReadAhead | None = None
    notes: tuple[str, ...] = ()


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
    values: Any = None
    best_step: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def resume_run(
    candidate: Candidate,
    objects: Mapping[str, object],
    request: ResumeRequest,
    *,
    skip_damaged: bool = True,
) -> Resumed:
    """Go on from a candidate, or make ready for a fresh start; all ranks call this.

    Nothing is changed before every check has passed on every rank. Only the bytes of tensors are
    verified while they are loaded.

    Args:
        candidate: The checkpoint; without one: a fresh start.
        objects: The live objects, by name.
        request: What they are held against, and how they are loaded.
        skip_damaged: Whether to go on with the next candidate where one is damaged; else
            `DamagedCandidateError` is raised, which holds the next one.
    """
    selector = candidate.selector
    while candidate.source is not None:
        attempt = _Attempt(candidate.source, selector, objects, request)
        damage = attempt.load()
        if damage is None:
            begun = _RunStart(selector, request, attempt.differences, attempt.same)
            report = begun.report(candidate)
            origin = candidate.origin or origin_in(candidate.source.manifest.facts)
            return attempt.resumed(report, origin)
        older = candidate.after(damage)
        if not skip_damaged:
            raise DamagedCandidateError(damage, older)
        candidate = older
    request.lineage.refuse_torn(selector.run)
    return Resumed(_RunStart(selector, request).report(candidate))


def check_branch_start(
    source: Source,
    selector: CandidateSelector,
    objects: Mapping[str, object],
    request: ResumeRequest,
) -> None:
    """Raise if a branch could not start in a checkpoint; nothing is changed."""
    attempt = _Attempt(source, selector, objects, request, is_beginning=True)
    try:
        damage = selector.readers.load(attempt.examine)
    finally:
        attempt.growth.take_back()
    if damage is not None:
        raise damage


def load_only(
    source: Source,
    selector: CandidateSelector,
    objects: Mapping[str, object],
    request: ResumeRequest,
) -> None:
    """Fill these objects alone from a checkpoint."""
    growth = Growth(objects, _was_built_alike(source, request.comparison))
    own: dict[str, Any] = {}

    def look() -> None:
        tree, _, _ = _read_state(source, selector, objects, request)
        own.update({name: tree[name] for name in objects})
        growth.grow(own)  # they may have grown since
        check(objects, own)

    def put() -> None:
        fill(objects, own)

    try:
        damage = selector.readers.load(look)
        damage = damage or selector.readers.load(put)
        if damage is not None:
            raise damage
        growth.keep()
    finally:
        growth.take_back()


# What a checkpoint holds for this rank.


_NO_OBJECTS = ("rng", "values", ATTRIBUTES_KEY, GRADIENTS, MODES)
"""What of the state is of no registered object."""


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
        yield from {*types_in(capture(self.objects)), *classes_at_hand(all_objects(self.objects))}


def _read_state(
    source: Source,
    selector: CandidateSelector,
    objects: Mapping[str, object],
    request: ResumeRequest,
) -> tuple[dict[str, Any], bool, tuple[Difference, ...]]:
    """Return the state by name; whether to reseed this rank; what of other ranks is lost."""
    decoded = partial(_decoded, source, objects, request)
    tree = decoded(STATE_FILE)
    if not {"rng", "values"} <= tree.keys():
        expected, found = "rng and values among them", sorted(map(str, tree))
        raise CorruptCheckpointError(source.folder, STATE_FILE, expected=expected, found=found)
    ranks = request.ranks
    own, reseeds_rank, lost = state_of_rank(
        {name: value for name, value in tree.items() if name in _NO_OBJECTS or name in objects},
        source.manifest,
        selector.group,
        ranks.per_rank,
        decoded,
        read_by_rank_0=ranks.read_from == "rank0",
        may_differ=ranks.may_differ,
        can_set_per_rank=request.loop is not None,
    )
    return with_own_modes({**tree, **own}), reseeds_rank, lost


def _decoded(
    source: Source, objects: Mapping[str, object], request: ResumeRequest, name: str
) -> dict[str, Any]:
    structure = structure_from_bytes(source.read_file(name), name)
    leaves = source if request.ahead is None else request.ahead.of(source)
    tree = decode(structure, leaves, types=_Classes(request.types, objects), lazy=True)
    if not isinstance(tree, dict):
        found = type(tree).__name__
        raise CorruptCheckpointError(source.folder, name, expected="objects by name", found=found)
    return tree


def _was_built_alike(source: Source, comparison: Comparison) -> Callable[[str], bool]:
    """Return what tells whether an object was built as the one was that made the checkpoint."""

    def is_as_built(path: str) -> bool:
        built = source.manifest.facts.get("built")
        if not isinstance(built, dict):  # an older version did not note it
            return False
        return bool(built.get(path) == comparison.facts["built"].get(path))

    return is_as_built


@dataclass(frozen=True)
class _Examined:
    """A checkpoint of which all was checked but the bytes of what is filled in place."""

    objects: Mapping[str, object]
    tree: Mapping[str, Any]
    rng: Mapping[str, Any]
    values: Any
    gradients: Mapping[str, Any]
    reseeds_rank: bool


class _Attempt:
    """One checkpoint that is tried: first examined on all ranks, then filled into the objects."""

    def __init__(
        self,
        source: Source,
        selector: CandidateSelector,
        objects: Mapping[str, object],
        request: ResumeRequest,
        *,
        is_beginning: bool = False,
    ) -> None:
        self.differences: tuple[Difference, ...] = ()
        self.same: tuple[Difference, ...] = ()
        self.growth = Growth(objects)
        self._source, self._selector = source, selector
        self._objects, self._request = objects, request
        self._is_beginning = is_beginning
        self._patterns: tuple[str, ...] = ()
        self._newly_registered: set[str] = set()
        self._examined: _Examined | None = None

    def load(self) -> CorruptCheckpointError | None:
        """Examine and fill; return the damage that was found, of which all ranks learn."""
        readers = self._selector.readers
        try:
            damage = readers.load(self.examine)
            # None on every rank: only now does one of them change something.
            return readers.load(self._fill) if damage is None else damage
        finally:
            self.growth.take_back()  # what has got its shape from here, and nothing more

    def resumed(self, report: ResumeReport, origin: Origin) -> Resumed:
        """Return what this checkpoint has brought back."""
        facts, values = self._source.manifest.facts, self._checked().values
        before = facts.get("skip")
        texts = [one for one in before if isinstance(one, str)] if isinstance(before, list) else []
        skipped = tuple(dict.fromkeys([*texts, *self._patterns]))
        best: Any = facts.get("best_step")
        return Resumed(report, values, best, facts, origin, skipped)

    def examine(self) -> None:
        """Read and check all that can be, and change nothing."""
        source, request, selector = self._source, self._request, self._selector
        run = selector.run
        if selector.group.rank == 0 and not run.is_readonly:
            run.check_journals()
        tree, reseeds_rank, lost = _read_state(source, selector, self._objects, request)
        moved = tree.pop(ATTRIBUTES_KEY, None)
        rng, values = load_tensors(tree.pop("rng"), "cpu"), load_tensors(tree.pop("values"))
        request.comparison.check_values(values)
        waiting = tree.pop(GRADIENTS, None)
        tree, objects, differences = self._fitting(tree)
        self.growth = Growth(objects, _was_built_alike(source, request.comparison))
        check_rng(rng, allow_missing_devices=True)
        differences = (*differences, *_of_devices(rng), *lost)
        tree = self._compared(tree, objects, differences, moved)
        gradients = {} if request.loop is None else request.loop.gradients.check(waiting)
        rng = of_devices_here(rng)
        if run.owns(source.storage, source.manifest):
            _metrics_bytes(source)
        self._examined = _Examined(objects, tree, rng, values, gradients, reseeds_rank)

    def _fitting(
        self, tree: dict[str, Any]
    ) -> tuple[dict[str, Any], Mapping[str, object], tuple[Difference, ...]]:
        """Return what is stored and here, now that schedules were found that were not given."""
        loop, facts = self._request.loop, self._source.manifest.facts
        missing = of_checkpoint(facts) if NOT_GIVEN_KEY in facts else ()
        objects, differences = self._objects, tuple[Difference, ...]()
        if loop is not None:
            known = facts.get("found")
            known = known if isinstance(known, Mapping) else {}
            skipped = self._request.comparison.skipped
            tree, objects, differences = loop.schedules.fit(tree, known, skipped)
        self._newly_registered = {name for name in objects if missing and name not in tree}
        objects = {n: one for n, one in objects.items() if n not in self._newly_registered}
        return tree, objects, (*differences, *missing)

    def _compared(
        self,
        tree: dict[str, Any],
        objects: Mapping[str, object],
        more: tuple[Difference, ...],
        moved: Any,
    ) -> dict[str, Any]:
        """Return what is to be loaded; raise if it does not fit or is not accepted."""
        comparison, source = self._request.comparison, self._source
        facts, found = self._differences(more, moved)
        found = by_severity((*found, *comparison.added_or_removed(tree)))
        is_here = source.storage is self._selector.run.storage
        own = is_here and source.manifest.run_id == self._selector.run.run_id  # not its parent's
        self._patterns = comparison.patterns(facts, own=own and not self._is_beginning)
        tree, skipped = comparison.partial(tree, self._patterns, found)
        self.growth.grow(tree)
        model = {"model"} & self._objects.keys()
        check(self._objects, tree, of=model)  # names both shapes, whatever else differs
        comparison.refuse(f"checkpoint of step {source.step}", found)
        comparison.accept(found)
        check(objects, tree, of={*objects, *tree} - model)
        self.differences = (*skipped, *found)
        return tree

    def _differences(
        self, more: tuple[Difference, ...], moved: Any
    ) -> tuple[Mapping[str, Any], tuple[Difference, ...]]:
        """Return the facts that this rank is compared with, and all that differs from them."""
        request, group = self._request, self._selector.group
        comparison, attributes = request.comparison, request.attributes
        stored = self._source.manifest.facts
        facts = facts_of_rank(stored, comparison.facts, group.rank, group.world_size)
        sums = () if request.buckets is None else request.buckets.differences(facts)
        rows = comparison.rows(facts, sums)
        self.same = tuple(row for row in rows if row.verdict == "same")
        rows = tuple(row for row in rows if row.verdict != "same")
        found = tuple(row for row in rows if not self._is_of_newly_registered(row))
        reported = {row.path for row in found}
        found = by_severity((*found, *(one for one in more if one.path not in reported)))
        around = () if request.loop is None else request.loop.around.differences(moved)
        return facts, by_severity((*found, *attributes.differences(moved, found), *around))

    def _is_of_newly_registered(self, row: Difference) -> bool:
        """Return whether a row tells only that an object came, which is told otherwise."""
        is_of = (f".{name}." in f".{row.path}." for name in self._newly_registered)
        return row.stored is None and any(is_of)

    def _checked(self) -> _Examined:
        if self._examined is None:
            raise RuntimeError("nothing was examined")
        return self._examined

    def _tell_of_the_lost(self, lost: Sequence[NotTakenBack]) -> None:
        """Take what objects did not take back for differences; raise where none is accepted."""
        found = tuple(
            Difference(one.path, brief(one.stored), brief(one.now), _FORGETFUL, "not covered")
            for one in lost
        )
        if found:
            self._request.comparison.refuse(f"checkpoint of step {self._source.step}", found)
            self.differences = by_severity((*self.differences, *found))

    def _fill(self) -> None:
        """Fill the objects with what was examined; the random generators last."""
        found, request = self._checked(), self._request
        request.lineage.is_torn = True
        self._tell_of_the_lost(fill(found.objects, found.tree))
        self.growth.keep()
        request.attributes.restore()
        request.attributes.take_effect(self.differences)
        if request.loop is not None:
            request.loop.around.restore()
            request.loop.gradients.restore(found.gradients)
        request.comparison.take_effect(self.differences)
        restore_rng(found.rng)
        if found.reseeds_rank:
            reseed_rank(found.rng, self._selector.group.rank)
        self._source.check_rest()
        request.lineage.is_torn = False


_FORGETFUL = "its load_state_dict did not take it back: state_dict returns another value since"


def _of_devices(rng: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Tell of random states that no device here can take."""
    missing = missing_devices(rng)
    if missing is None:
        return ()
    where, stored, now = missing
    effect = "random numbers on these devices differ from here on"
    return (Difference(where, stored, now, effect, "changed"),)


# The run directory, cleared of what belongs to another future.


class _RunStart:
    """What a start makes of the run directory; rank 0 alone writes there."""

    def __init__(
        self,
        selector: CandidateSelector,
        request: ResumeRequest,
        differences: tuple[Difference, ...] = (),
        same: tuple[Difference, ...] = (),
    ) -> None:
        self._run, self._group = selector.run, selector.group
        self._request = request
        self._differences, self._same = differences, same

    def report(self, candidate: Candidate) -> ResumeReport:
        """Return the report, once rank 0 has set later state aside; all ranks call this."""
        group, source = self._group, candidate.source
        agreed = from_rank_0(group, self._differences)

        def begin() -> ResumeReport | None:
            with as_directory_error(self._run.storage):
                return self._set_aside_later_state(candidate, agreed)

        report = group.run_on_all("begin", begin if group.rank == 0 else lambda: None)
        if report is not None:
            return report
        checkpoint = None if source is None else source.storage.describe(source.folder)
        step, differences = 0 if source is None else source.step, self._differences
        rejected = candidate.rejected
        return ResumeReport(step, checkpoint, rejected, differences=differences, same=self._same)

    def _set_aside_later_state(
        self, candidate: Candidate, differences: tuple[Difference, ...]
    ) -> ResumeReport:
        """Set aside what belongs to another future, cut the metrics, and tell the history."""
        run, source, selection = self._run, candidate.source, candidate.selection
        if source is None:  # else the journals were checked with the checkpoint
            run.check_journals()
        own = source is not None and run.owns(source.storage, source.manifest)
        step = 0 if source is None else source.step
        moved = tuple(
            (folder, run.catalog.set_aside(later, f"a run from step {step} began"))
            for later, folder in run.catalog.folders()
            if self._must_be_set_aside(later, folder, source, own=own)
        )
        known = _metrics_bytes(source) if source is not None and own else 0
        follows = own and selection.kind in ("auto", "continue_from_path")
        notes = self._cut_metrics(known, step, keep_copy=not follows)
        notes = (*self._notes_on(selection, source, own=own), *notes)
        report = ResumeReport(
            step=step,
            checkpoint=None if source is None else source.storage.describe(source.folder),
            rejected=candidate.rejected,
            set_aside=moved,
            previous_owner=run.previous_owner,
            differences=differences,
            same=self._same,
            notes=(*self._request.notes, *notes),
        )
        started = {"event": "started", "at": now_as_text(self._request.clock)}
        run.history.append({**started, **report.to_json()})
        return report

    def _must_be_set_aside(
        self, step: int, folder: str, source: Source | None, *, own: bool
    ) -> bool:
        """Return whether a checkpoint is of another future than what comes after `source`."""
        if source is None or source.storage is not self._run.storage:
            return True
        if own:
            return step > source.step
        if folder == source.folder:
            return False
        try:  # this run begins in a checkpoint that was copied here; older copies stay beside it
            found = CheckpointReader(self._run.storage, folder)
        except CheckpointError:
            return True
        return self._run.catalog.is_own(found) or step > source.step

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

    def _notes_on(
        self, selection: ResumeChoice, source: Source | None, *, own: bool
    ) -> tuple[str, ...]:
        """Say where a run began, where that is not what the selection says by itself."""
        if selection.kind == "continue_from_path":
            goes_on = "it goes on from its own newest checkpoint"
            where = f"this run began in {selection.path}"
            return (f"{where}: {goes_on}; another directory begins anew",)
        if source is None or own or source.storage is not self._run.storage:
            return ()
        return (f"{source.folder} is of run {source.manifest.run_id}: this run begins in it",)


def _is_after(step: int, line: Mapping[str, Json]) -> bool:
    """Return whether a line of metrics is of a later step."""
    found = line.get("step")
    return isinstance(found, int | float) and found > step


def _metrics_bytes(source: Source) -> int:
    """Return how long metrics.jsonl was when a checkpoint was saved."""
    found = source.manifest.facts.get("metrics_bytes")
    if type(found) is not int or found < 0:
        where = f"{source.folder}: manifest.json"
        raise CorruptCheckpointError(where, "facts.metrics_bytes", expected="bytes", found=found)
    return found
