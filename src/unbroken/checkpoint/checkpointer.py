"""Checkpointer: saves live objects into a run directory, and brings them back."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from inspect import signature
from types import TracebackType
from typing import Any, Self
from weakref import WeakMethod

import torch.distributed as dist

from unbroken.capture import capture, capture_rng
from unbroken.changes.compare import Comparison, ResumePolicy
from unbroken.changes.differences import Difference, ResumeReport
from unbroken.checkpoint.arguments import (
    Clock,
    RankPolicy,
    RunFacts,
    check_keywords,
    check_kinds,
    check_objects,
    save_policy_of,
    tell_line,
)
from unbroken.checkpoint.cadence import SavePolicy, SaveSteps, SaveTimer
from unbroken.checkpoint.confirm import Hears, StepConfirmation
from unbroken.checkpoint.coverage.attributes import ATTRIBUTES_KEY, Attributes, is_bare
from unbroken.checkpoint.coverage.loop_watch import GRADIENTS, LoopWatch
from unbroken.checkpoint.coverage.schedules import covers
from unbroken.checkpoint.coverage.unregistered import UncoveredNotices, missing_facts
from unbroken.checkpoint.ddp_buckets import DdpBuckets
from unbroken.checkpoint.loop.data import LoopData, data_apart
from unbroken.checkpoint.loop.host import Around
from unbroken.checkpoint.loop.stored import values_of_user
from unbroken.checkpoint.loop.training_loop import LoopMethods, TrainingLoop
from unbroken.checkpoint.resume.per_rank import (
    RANK_FACTS_KEY,
    RankFact,
    agree_on_versions,
    others_of_ranks,
)
from unbroken.checkpoint.resume.readers import ReadAhead
from unbroken.checkpoint.resume.resume import (
    ResumeRequest,
    check_branch_start,
    load_only,
    resume_run,
)
from unbroken.checkpoint.resume.selection import (
    Candidate,
    CandidateSelector,
    ForeignFormat,
    Origin,
    ResumeChoice,
    ResumeFrom,
)
from unbroken.checkpoint.run_access import RunAccess, let_go_when_dropped
from unbroken.checkpoint.save.async_saver import AsyncSaver, SaveCost
from unbroken.checkpoint.save.rank_shares import (
    MODES,
    CapturedState,
    SharePlan,
    differing,
    modes_apart,
    rng_digest,
)
from unbroken.checkpoint.save.session import (
    Rehearsal,
    SaveLineage,
    SaveRequest,
    SaveSession,
)
from unbroken.distributed import Group
from unbroken.errors import RankError, SaveError, UnbrokenError, spelled
from unbroken.fingerprint import object_facts
from unbroken.goodput import SaveInterval
from unbroken.storage import Storage
from unbroken.store import KeepPolicy, RunDirectory
from unbroken.store.run.directory import now_as_text

_ONCE = "the ranks hold different states; only rank 0's is saved"
_RESERVED = ("rng", "values", ATTRIBUTES_KEY, GRADIENTS, MODES)


class Checkpointer(LoopMethods):
    """Saves objects of a training run, and resumes them bit for bit.

    A save is atomic and durable: when `save` returns (or `wait`, with a mode other than
    "blocking"), the checkpoint survives a power cut; when it does not return, all earlier
    checkpoints are as they were. `resume` uses a checkpoint only
    if every byte is the one that was saved. The states of all global random generators (Python,
    NumPy, PyTorch on every device) belong to each checkpoint.

    Args:
        directory: The run directory; made, and locked, when first used.
        branch: Work in the branch of this name instead, a run of its own. The first `resume`
            names the checkpoint where the branch starts; later calls continue the branch.
        save_steps: `save_if_due` saves every so many steps: short for `SavePolicy(steps=...)`.
        save: When `save_if_due` saves, and whether training goes on meanwhile.
        keep: Which checkpoints stay; applied after each commit. None: all.
        resume: Which differences a resume accepts; None: those that leave the training the same.
        ranks: The ranks that train the same model; a group alone means the usual policy. None:
            this process alone.
        settings: What else the training depends on, in groups of plain values:
            {"data": {"path": ...}}. They are compared on resume, as the code and the
            hyperparameters of the objects are. `RunFacts` gives more than settings.
        types: Classes of namedtuples and enums inside the state, which are never looked up by
            the name that a file holds.
        clock: The clocks; None: the machine's.
        tell: Called with each line that is told, on rank 0: what `resume` found, and what is not
            covered. None: nothing is told.
        objects: What to save, by name: modules, optimizers, schedulers, a GradScaler, random
            generators, tensors, anything with `state_dict` and `load_state_dict`, and lists and
            dicts of these; an object of a class of your own that has neither by its attributes. The
            object called `model` gives the parameters their names.

    Attributes:
        values: The plain values that were saved with the checkpoint resumed last.
        resumed_facts: The facts of that checkpoint.
        best_step: The step of the best checkpoint so far, which is never removed.
        attributes: What training makes of attributes of the user's own objects, those that are
            registered and those that `RunFacts` names: they are saved and restored.
        comparison: What this start is, for checkpoints to be compared with.
        buckets: How `DistributedDataParallel` adds gradients.
        confirmation: Whether the steps that a killed start had taken are repeated bit for bit.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> with Checkpointer(tempfile.mkdtemp(), model=model, tell=None) as checkpointer:
        ...     print(checkpointer.resume().resumed)
        ...     path = checkpointer.save(1)
        ...     _ = torch.nn.init.zeros_(model.weight)
        ...     print(checkpointer.resume().step, bool(model.weight.any()))
        False
        1 True
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | Storage,
        /,
        *,
        branch: str | None = None,
        save_steps: SaveSteps = None,
        save: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        resume: ResumePolicy | None = None,
        ranks: RankPolicy | Group | None = None,
        settings: Mapping[str, Any] | RunFacts | None = None,
        types: Iterable[type] = (),
        clock: Clock | None = None,
        tell: Callable[[str], None] | None = tell_line,
        **objects: object,
    ) -> None:
        check_keywords(save, keep, resume, clock)
        check_kinds(directory=directory, branch=branch, types=types, tell=tell)
        data = data_apart(objects)
        objects = {name: one for name, one in objects.items() if name not in data}
        check_objects(objects, _KEYWORDS, _RESERVED)
        save = save_policy_of(save, save_steps)
        self._clock = Clock() if clock is None else clock
        self._ranks, self._run_facts = RankPolicy.of(ranks), RunFacts.of(settings)
        bare = {name: objects.pop(name) for name in [*objects] if is_bare(objects[name])}
        self.objects: dict[str, object] = objects
        self.attributes = Attributes(
            objects,
            bare,
            self._run_facts.other_objects,
            reads_ahead=self._run_facts.reads_ahead,
        )
        self.keep = KeepPolicy() if keep is None else keep
        self.best_step: int | None = None
        self.values: Any = None
        self.resumed_facts: Mapping[str, Any] = {}
        self.group = self._ranks.given_group
        self._layout, self._tell_user, self._types = save.layout, tell, tuple(types)
        self._may_hold_foreign_files = False  # which are of no run
        self._rank_facts: dict[str, list[RankFact]] | None = None  # that differ from rank 0's
        self._build_checks(resume)
        self._lineage = SaveLineage()
        self._saver = AsyncSaver(save.mode, self.group, self.objects)
        self._plan = SharePlan()
        self._timer = SaveTimer(save, group=self.group, clock=self._clock.monotonic)
        self._build_loop(LoopData(data, objects, bare, self.group), has_cadence=save.has_cadence)
        self._access = RunAccess(
            self.group,
            directory,
            branch,
            clock=self._clock.wall,
            unseen=self._ranks.read_from == "rank0",
            give_way=WeakMethod(self._training_loop.give_way),
        )
        let_go_when_dropped(self, self._saver, self._access)

    def _build_loop(self, data: LoopData, *, has_cadence: bool) -> None:
        around = Around(self.attributes, self._loop, self._clock, self._tell)
        self._training_loop = TrainingLoop(self, data, around, has_cadence=has_cadence)

    def _build_checks(self, policy: ResumePolicy | None) -> None:
        """Make what compares this start with others, and finds what was not given to be saved."""
        facts = self._run_facts
        self.comparison = Comparison(
            self.objects,
            settings=facts.settings,
            more=partial(self._more_facts, facts.more),
            policy=policy,
            examine=facts.filter,
            made_by_settings=facts.made_by_settings,
            check_values=facts.check_values,
        )
        self._notices = UncoveredNotices(
            self.comparison,
            self._uncovered_buckets,
            where=lambda: self.run.storage.describe(),
            tell=self._tell,
        )
        self.buckets = DdpBuckets(self.objects, self.group, self._notices.tell_of)
        self._rehearsal = Rehearsal(self.objects)
        hears = Hears(self._tell, self._notices.report, self.note_event)
        self.confirmation = StepConfirmation(self.objects, self.group, self._clock.wall, hears)
        self._loop: LoopWatch | None = None
        if not facts.is_complete:
            on_batch = self.confirmation.observer.note_batch
            self._loop = LoopWatch(self.objects, self.attributes, self._tell, on_batch)

    def _more_facts(self, more: Callable[[], Mapping[str, Any]] | None) -> Mapping[str, Any]:
        bare = self.attributes.bare.items()
        own = {"state": {name: object_facts(one) for name, one in bare}} if bare else {}
        return {**own, **self._training_loop.facts(), **({} if more is None else more())}

    @property
    def _shared_buckets(self) -> DdpBuckets | None:
        """The buckets, where processes add gradients together; None: this one is alone."""
        has_group = dist.is_available() and dist.is_initialized()
        return self.buckets if has_group and dist.get_world_size() > 1 else None

    def _uncovered_buckets(self) -> tuple[Difference, ...]:
        return () if (buckets := self._shared_buckets) is None else buckets.uncovered()

    def register(self, **objects: object) -> None:
        """Add objects to save, or put others in the place of those of the same names.

        Call it before the first `resume` or `save` that is to know them.

        Raises:
            ConfigError: One of them cannot be saved, or a name is taken.
        """
        check_objects(objects, _KEYWORDS, _RESERVED)
        bare = {name: one for name, one in objects.items() if is_bare(one)}
        self.attributes.bare.update(bare)
        self.objects.update({name: one for name, one in objects.items() if name not in bare})

    @property
    def run(self) -> RunDirectory:
        """The run directory, opened and locked by the first use."""
        return self._access.run(may_hold_foreign_files=self._may_hold_foreign_files)

    def choose(
        self,
        which: ResumeFrom | ResumeChoice = "auto",
        *,
        foreign: ForeignFormat | None = None,
        examine: Callable[[Candidate], None] | None = None,
    ) -> Candidate:
        """Return the checkpoint for `resume`: its manifest is valid, and file sizes match.

        Its bytes are not verified yet; `resume` verifies them.

        Args:
            which: As `resume` takes it, and raising as that does.
            foreign: Another format whose checkpoints are taken too; the caller loads those. The
                run may then begin in a directory that holds other things, which stay.
            examine: Called on each rank with each candidate; if it raises CorruptCheckpointError,
                the candidate is skipped.
        """
        with self._errors_in_loop_words():
            self.wait()
            self._may_hold_foreign_files = self._may_hold_foreign_files or foreign is not None
            return self._selector(foreign, examine).first(ResumeChoice.parse(which))

    def _selector(self, *more: Any, run: RunDirectory | None = None) -> CandidateSelector:
        return CandidateSelector(
            self.run if run is None else run, self.group, self._ranks.read_from, *more
        )

    def resume(
        self,
        which: ResumeFrom | ResumeChoice | Candidate = "auto",
        *,
        ahead: ReadAhead | None = None,
    ) -> ResumeReport:
        """Put a saved state into the objects, or leave them as they are for a fresh start.

        Checkpoints of a later step than the one resumed are set aside by name: they can never
        win again. The lines that metrics.jsonl got after the resumed save are cut off.

        Args:
            which: "auto": the newest intact checkpoint, or a fresh start if there is none;
                True, "must", "latest" or "last": the newest intact one, or an error; False or
                "never": a fresh start; "best"; a step number; the path of a checkpoint folder;
                or what `choose` has returned.
            ahead: What `read_ahead` has begun to read of that checkpoint.

        Returns:
            What was found and done.

        Raises:
            CheckpointNotFoundError: If the checkpoint asked for does not exist, or if there
                are checkpoints but not one is intact.
            CorruptCheckpointError: If the one checkpoint asked for is damaged. Its tensors are
                verified while they are loaded: some objects may have got theirs, and cannot
                be saved or begin a run before a resume has succeeded.
            DifferenceError: If the training changed and the change is not named; neither an
                object nor the run directory was changed, on any rank.
            StateMismatchError: If the checkpoint does not fit the objects; likewise.
            DamagedCandidateError: If what `choose` returned is damaged; the error has the next one.
        """
        self._training_loop.refuse_resume()
        with self._errors_in_loop_words():
            report = self._resumed(which, ahead)
        for line in () if self._run_facts.is_complete else report.lines():
            self._tell(line)
        self._training_loop.resumed(report)
        return report

    def _resumed(
        self, which: ResumeFrom | ResumeChoice | Candidate, ahead: ReadAhead | None
    ) -> ResumeReport:
        self.wait()
        lines: list[str] = []
        if self._loop is not None:
            self._loop.schedules.forget()
            lines = self._loop.lines()
        if not self._lineage.is_torn:  # else an attempt before has noted what was here
            self.attributes.note()
            if self._loop is not None:
                self._loop.around.note()
        with self.attributes.initial_values():
            self.comparison.record_current_facts()
        agree_on_versions(self.group)
        self._rank_facts = self._facts_of_others()
        self._rehearsal.at_the_start(self.group)
        request = self._resume_request(ahead)
        is_given = isinstance(which, Candidate)
        candidate = which if isinstance(which, Candidate) else self._chosen_here(which, request)
        request = replace(request, notes=(*self._access.notes, *lines))
        resumed = resume_run(candidate, self.objects, request, skip_damaged=not is_given)
        report, self.resumed_facts = resumed.report, resumed.facts
        self.values, self.best_step = resumed.values, resumed.best_step
        self._lineage.resumed(self._access.reader_of(report), resumed.origin, resumed.skipped)
        if (buckets := self._shared_buckets) is not None:
            buckets.bring_back(resumed.facts)
        self._timer.begin(report.step, self.run.history.records(past_damage=True))
        self._access.has_started = True
        if self._loop is not None:
            self._loop.schedules.note_resumed()
        self._rehearsal.begin(report.step)
        is_here, strict = self._lineage.previous is not None, self.comparison.is_strict
        more, confirmation = {"is_here": is_here, "strict": strict}, self.confirmation
        report = confirmation.resumed(self.run, report, resumed.facts, **more)
        self._notices.begin((resumed.report if strict else report).differences)
        if strict:
            look = partial(self._notices.tell, confirmation.differences)
            self.group.run_on_all("look for what is not covered", look)
        return report

    def _chosen_here(self, which: ResumeFrom | ResumeChoice, request: ResumeRequest) -> Candidate:
        """Return the first candidate in this run; one that begins as a branch is made."""
        selection = ResumeChoice.parse(which)
        if selection.path is not None and self._access.holds(selection.path):
            self._may_hold_foreign_files = (
                True  # a checkpoint that was copied there under another name
            )

        def refuse(left: RunDirectory, step: int) -> None:
            selector = self._selector(run=left)
            check_branch_start(selector.at_step(step), selector, self.objects, request)

        selection = self._access.begin_branch(selection, refuse)
        return self._selector().first(selection)

    def import_state(
        self, step: int, values: Any = None, *, facts: Mapping[str, Any], source: str | Origin
    ) -> str:
        """Begin the run in a state that the objects already have, brought from elsewhere.

        It is saved as checkpoint `step`; until that stands, nothing that was there is touched.
        Then checkpoints of later steps, of whatever kind, are set aside.

        Args:
            step: Completed optimizer steps of the state.
            values: As `save` takes them.
            facts: As `save` takes them.
            source: Where the state is from, for the history; `origin_of` a checkpoint, by which
                the run knows where it began.

        Returns:
            The folder of the checkpoint.
        """
        origin = {"origin": source} if isinstance(source, str) else source
        self._lineage.has_begun, self._lineage.origin = True, origin
        self.comparison.record_current_facts()
        path = self.save(step, values, facts=facts)
        self.wait()
        if self.group.rank == 0:
            catalog = self.run.catalog
            for later in [found for found, _ in catalog.folders() if found > step]:
                catalog.set_aside(later, f"a run from step {step} began")
        self.note_event({"event": "adopted", "step": step, "from": origin["origin"]})
        return path

    def load(self, step: int, names: Iterable[str]) -> None:
        """Put only some objects back, from the checkpoint of `step`; the run goes on as it is.

        Raises:
            CheckpointError: If the checkpoint does not exist, is damaged or does not fit.
        """
        self.wait()
        objects, selector = {name: self.objects[name] for name in names}, self._selector()
        load_only(selector.at_step(step), selector, objects, self._resume_request())

    def _resume_request(self, ahead: ReadAhead | None = None) -> ResumeRequest:
        return ResumeRequest(
            comparison=self.comparison,
            ranks=self._ranks,
            types=self._types,
            loop=self._loop,
            attributes=self.attributes,
            buckets=self._shared_buckets,
            lineage=self._lineage,
            clock=self._clock.wall,
            ahead=ahead,
        )

    def save_if_due(self, step: int, values: Any = None) -> str | None:
        """Save if the cadence says so; return the folder of the checkpoint, or None."""
        self._training_loop.refuse_by_hand("save_if_due")
        self.rehearse(step, lambda: values)
        return self.save(step, values) if self.should_save(step) else None

    def should_save(self, step: int) -> bool:
        """Return whether the cadence asks for a save after `step` steps; raises as `wait` does.

        Raises:
            CaptureError: After the first step: something could not be saved.
        """
        self._training_loop.refuse_by_hand("should_save")
        self.rehearse(step)
        self._saver.poll()
        return self._timer.due(step, again=self._saver.must_repeat, cost=self._saver.cost)

    def save(self, step: int, values: Any = None, *, facts: Mapping[str, Any] | None = None) -> str:
        """Save the objects as they are now. In mode "blocking" it is durable on return.

        In other modes it is durable when `wait` returns, or when `poll` names it; an error of
        such a save is raised by the next `save`, `should_save`, `poll` or `wait`.

        Args:
            step: Completed optimizer steps.
            values: Plain values and tensors to get back in `self.values` on resume.
            facts: JSON values for the manifest, shown by `unbroken show`.

        Returns:
            The folder of the checkpoint, as a path.

        Raises:
            CaptureError: If something cannot be stored; the message names its path and type.
            SaveError: If the disk fails or is full; all earlier checkpoints are as they were.
            RankError: If it failed on another rank, or the ranks do not hold the same state.
        """
        self._training_loop.refuse_by_hand("save")
        with self._errors_in_loop_words():
            self._saver.finish_previous()  # an error of that save is raised here
            run = self.run
            self.confirmation.agree()
            if self._loop is not None:
                self._loop.look()
            state, missing = self._captured(values)
            request = self._save_request(step, run, missing, facts or {})
            self._saver.submit(SaveSession(run, request, state, self._plan, self._lineage))
            self.confirmation.saved(run, step)
            self._rehearsal.note_saved(step)
            self._lineage.has_begun = True
            self._timer.done(step)
            return self.path(step)

    def _captured(self, values: Any) -> tuple[CapturedState, tuple[Difference, ...]]:
        """Return what this rank has to save, and what a resume will miss of it."""
        group, own = self.group, () if self._ranks.read_from == "rank0" else self._ranks.per_rank
        if group.world_size > 1 and own is not None and "rng" not in own:
            group.agree("the random generators at a save", rng_digest())
        missing = group.run_on_all(
            "look for what was not given", lambda: self._look_back(values_of_user(values))
        )
        tree = group.run_on_all("capture the state", lambda: capture(self.objects))
        tree |= modes_apart(group, tree) | self._moved(tree, values)
        tree |= {} if self._loop is None else self._loop.gradients.on_all(group)
        tree |= {"values": values, "rng": capture_rng()}
        differing, once = self._differing(tree, own)
        self._notices.tell_of(once)
        buckets, by_hand = self._shared_buckets, not self._run_facts.is_complete
        buffers = () if buckets is None else buckets.buffers_of_rank_0()
        return CapturedState(tree, own, differing, buffers, by_hand), (*missing, *once)

    def _save_request(
        self,
        step: int,
        run: RunDirectory,
        missing: tuple[Difference, ...],
        facts: Mapping[str, Any],
    ) -> SaveRequest:
        not_given = missing_facts(missing) if missing else {}
        layout, facts = self._layout(self.objects), {**self._facts(run), **not_given, **facts}
        history_fields = self._timer.history_fields(self._saver.cost)
        return SaveRequest(step, layout, facts, self.keep, history_fields, self._clock.wall)

    @contextmanager
    def _errors_in_loop_words(self) -> Iterator[None]:
        """Let errors name settings as they are named here, unless a Trainer has them."""
        try:
            yield
        except UnbrokenError as error:
            if self._loop is not None:
                error.respell(partial(spelled, place="loop"))
            raise

    def _differing(
        self, tree: Mapping[str, Any], own: Collection[str] | None
    ) -> tuple[Collection[str], tuple[Difference, ...]]:
        """Return what differs between ranks: what each stores, and what is stored once for all."""
        if own is None or own or self.group.world_size == 1:
            return (), ()
        is_complete, ranks = self._run_facts.is_complete, self._ranks
        every = tree.keys() - {"rng", "values", ATTRIBUTES_KEY, MODES}
        names = sorted(ranks.may_differ if is_complete else every)
        found = differing(self.group, tree, names, self._plan.saves)
        separate = found.intersection(() if ranks.read_from == "rank0" else ranks.may_differ)
        once = sorted(found - separate)
        return separate, tuple(Difference(one, None, None, _ONCE, "not covered") for one in once)

    def _look_back(self, values: Any) -> tuple[Difference, ...]:
        """Tell of what the training until now had and a save has not; return it."""
        found = self.confirmation.differences
        found += () if self._loop is None else self._loop.look_back(values)
        self._notices.tell(found)
        return found

    def _tell(self, line: str) -> None:
        if self._tell_user is not None and self.group.rank == 0:
            self._tell_user(line)

    def _moved(self, tree: Mapping[str, Any], values: Any) -> dict[str, Any]:
        """Return what training has made of attributes; nothing if no rank has any."""
        moved = self.group.run_on_all("capture the state", lambda: self.attributes.state(tree))
        moved |= {} if self._loop is None else self._loop.around.state(values_of_user(values))
        alone = self.group.world_size == 1
        return {ATTRIBUTES_KEY: moved} if (moved if alone else self.group.any(bool(moved))) else {}

    def rehearse(self, step: int, values: Callable[[], Any] = lambda: None) -> None:
        """Raise, after the first step of a start, what a save would raise; nothing is written.

        It does so once; `should_save` and `save_if_due` call it.

        Args:
            step: Completed optimizer steps.
            values: Returns what would be saved with the objects.

        Raises:
            CaptureError: Something cannot be stored; the message names its path and type.
            RankError: That happened on another rank.
        """
        self._rehearsal.after_a_step(step, self.group, values, self._layout)

    def wait(self) -> None:
        """Wait until every checkpoint that was saved is durable.

        Raises:
            SaveError: If the disk failed or is full, or if tensors were changed while they were
                copied (mode "overlap"); all earlier checkpoints are as they were.
        """
        self._saver.wait()

    @property
    def last_save_cost(self) -> SaveCost | None:
        """What the last finished save of this process took."""
        return self._saver.cost

    @property
    def save_interval(self) -> SaveInterval | None:
        """How often the run is saved by itself, and why; None: at fixed times, or on rank > 0."""
        return self._timer.interval(self._saver.cost)

    def poll(self) -> list[str]:
        """Return the folders of checkpoints durable since the last call; raises as `wait` does.

        Every rank calls it, and all are told of a checkpoint at the same call.
        """
        self._saver.poll()
        return [self.path(step) for step in self._saver.committed()]

    def path(self, step: int) -> str:
        """Return the path of the checkpoint of a step, whether it is there or not."""
        return self.run.storage.describe(f"checkpoint-{step}")

    def _facts_of_others(self) -> dict[str, list[RankFact]]:
        return others_of_ranks(
            self.group,
            self.comparison.facts if self.group.world_size > 1 else {},
            per_rank=self._ranks.per_rank or (),
            one_data_set=self._run_facts.one_data_set,
        )

    def _facts(self, run: RunDirectory) -> dict[str, Any]:
        if self._rank_facts is None:
            self._rank_facts = self._facts_of_others()
        schedules = None if self._loop is None else self._loop.schedules
        buckets = self._shared_buckets
        return {
            "metrics_bytes": run.metrics.nbytes,
            "best_step": self.best_step,
            **self._lineage.facts(),
            **self.comparison.facts,
            "covers": covers(self.objects, () if schedules is None else schedules.found),
            **self.confirmation.facts(),
            **({} if buckets is None else buckets.facts()),
            **({"found": schedules.facts()} if schedules is not None and schedules.found else {}),
            **({RANK_FACTS_KEY: self._rank_facts} if self._rank_facts else {}),
            **({"not_judged": self.attributes.unknown} if self.attributes.unknown else {}),
        }

    def log(self, record: Mapping[str, Any] | None = None, **values: Any) -> None:
        """Append one line to metrics.jsonl: there exactly once, however often the run is killed.

        Args:
            record: Numbers, texts, and lists and dicts of these; tensors and arrays of one number,
                and numbers of NumPy, are taken as numbers.
            values: More of these, by name; in a loop over `steps` or `epochs` the step belongs to
                them, and the epoch.

        Raises:
            ConfigError: A value is something else.
        """
        run, record = self.run, self._training_loop.record(record or {}, values)
        if self.group.rank == 0:
            self._lineage.require_resumed(run)
            run.metrics.append(record)

    def note_event(self, event: Mapping[str, Any]) -> None:
        """Append one line to history.jsonl; on other ranks than 0 nothing happens."""
        run = self.run
        if self.group.rank == 0:
            run.history.append({**event, "at": now_as_text(self._clock.wall)})

    def close(self) -> None:
        """Wait as `wait` does, and release the run directory. Calling it twice is harmless."""
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        self.buckets.close()
        self._training_loop.closed()
        self.confirmation.close()
        try:
            self._rehearsal.end()
            self._saver.close(hurried=error is not None)
        finally:
            if self._saver.is_idle:  # else a later call ends it
                if self._loop is not None:
                    self._loop.end()
                self._access.close(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._close(error)
        except (SaveError, RankError) as failure:
            if error is None:
                raise
            error.add_note(f"and a save failed: {failure}")


_KEYWORDS = [
    name for name, one in signature(Checkpointer).parameters.items() if one.kind is one.KEYWORD_ONLY
]
TAKEN = (*_RESERVED, *_KEYWORDS, "self", "directory")
"""Names that no object to save can have."""
