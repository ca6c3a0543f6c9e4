"""The checkpoints of a Trainer's run: what is in one, saving, and resuming."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from unbroken.capture import decode, encode, types_in
from unbroken.changes.apply import apply_settings
from unbroken.checkpoint import (
    Checkpointer,
    Clock,
    Difference,
    InitialHyperparameters,
    Layout,
    RankPolicy,
    ResumeChoice,
    ResumeFrom,
    ResumePolicy,
    ResumeReport,
    RunFacts,
    SavePolicy,
    TrainingStopped,
    may_go_on,
)
from unbroken.checkpoint.arguments import check_state
from unbroken.checkpoint.checkpointer import TAKEN
from unbroken.data import BatchSource, LoaderSource, MicroBatch
from unbroken.distributed import Group
from unbroken.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, DataError
from unbroken.fingerprint import (
    begin_data_facts,
    callable_facts,
    is_user_code,
    keeps_generators,
    names_in_class,
    object_facts,
    qualified_name,
    subclass_facts,
)
from unbroken.storage import CompressedStorage, LocalStorage, Storage
from unbroken.store import KeepEvery, KeepPolicy
from unbroken.store.run.directory import as_directory_error
from unbroken.training.callback import Callback, CallHook, named, with_state
from unbroken.training.config import TrainerConfig
from unbroken.training.config_rules import (
    ENDING_SETTINGS,
    METRIC_SETTINGS,
    OPTIMIZER_OPTIONS,
    SCHEDULE_SETTINGS,
    Examination,
)
from unbroken.training.data_parallel import DataParallelLayout
from unbroken.training.display import Display
from unbroken.training.optim import factor_of
from unbroken.training.run_state import Pace, Progress, RunState, Window, batch_digest, count_steps
from unbroken.training.setup import Parts, deterministic_kernels

# Loaders that give each rank its own batches: their states, stored and given back by rank.


def gives_own_batches(source: BatchSource | None, group: Group) -> bool:
    """Return whether each rank reads its own loader, whose position the others do not know."""
    return group.world_size > 1 and isinstance(source, LoaderSource) and not source.gives_samples


def exchange_loader_states(source: BatchSource | None, group: Group) -> None:
    """Put the positions of all ranks into a loader's state; all ranks call it before each save.

    Ranks that share a part of the data (tensor parallelism) stand at the same position.
    """
    if not gives_own_batches(source, group):
        return
    loader = cast("LoaderSource", source)
    own = loader.rank_state()
    states: Any = group.gather("the places of the loaders", [loader.shape.rank, _as_text(own)])
    by_part = dict(reversed(states))  # the lowest rank represents its part
    types = types_in(own)
    loader.rank_states = [_from_text(by_part[part], types) for part in sorted(by_part)]


class _Leaves:
    """Leaves that came from another rank, for `decode`."""

    def __init__(self, leaves: Mapping[str, Mapping[str, Any]]) -> None:
        self._data = {path: base64.b64decode(leaf["data"]) for path, leaf in leaves.items()}
        tensors = {
            path: SimpleNamespace(
                nbytes=len(self._data[path]), dtype=leaf["dtype"], shape=tuple(leaf["shape"])
            )
            for path, leaf in leaves.items()
        }
        self.manifest: Any = SimpleNamespace(tensors=tensors)

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        if buffer.nbytes:
            buffer.cast("B")[:] = self._data[path]

    def read_box_into(self, path: str, *_: Any) -> None:
        raise CheckpointNotFoundError(path, "the state of a loader is never sharded")


def _as_text(state: Any) -> Any:
    encoded = encode(state)
    leaves = {
        leaf.path: {
            "data": base64.b64encode(b"".join(leaf.chunks())).decode(),
            "dtype": leaf.dtype,
            "shape": list(leaf.shape),
        }
        for leaf in encoded.leaves
    }
    return {"structure": encoded.structure, "leaves": leaves}


def _from_text(text: Any, types: Iterable[type]) -> Any:
    return decode(text["structure"], _Leaves(text["leaves"]), types=types)


def check_first_step_batches(
    windows: Iterable[list[MicroBatch]], source: BatchSource | None, division: DataParallelLayout
) -> Iterator[list[MicroBatch]]:
    """Yield the windows; raise before the first step if a loader does not deal as it must.

    Raises:
        DataError: All ranks were given the same batches; or samples that should be the same on
            all ranks are not.
    """
    group, batches = division.group, iter(windows)
    if group.world_size > 1 and isinstance(source, LoaderSource):
        window = group.run_on_all("read the first batches", lambda: next(batches, None))
        if window is None:
            return
        _refuse_wrong_dealing(division, source, window)
        yield window
    yield from batches


def _refuse_wrong_dealing(
    division: DataParallelLayout, source: LoaderSource, window: list[MicroBatch]
) -> None:
    seen = source.first_items if source.gives_samples else [micro.data for micro in window]
    digests = division.group.gather("the first batches", _digest(seen))
    of_parts = set(zip(division.takes, map(str, digests), strict=True))
    if len(of_parts) > division.parts and not source.gives_samples:
        raise DataError(
            "train_dataset",
            "gives ranks that hold one model together different batches",
            expected=f"the same batches on ranks of one part of the data: {division.takes}",
            hint="give the data set itself, which is dealt here",
        )
    are_same = len({str(digest) for digest in digests}) == 1
    if are_same and division.parts > 1 and not source.gives_samples:
        raise DataError(
            "train_dataset",
            "gives all ranks the same batches",
            expected="each rank's own",
            hint="give the data set itself, which is dealt here; or let the loader deal it: a "
            "DistributedSampler, or an iterable that looks at its rank",
        )
    if not are_same and source.gives_samples:
        raise DataError(
            "train_dataset",
            "gives each rank other samples, of which each would take but a part",
            expected="the same samples on all ranks: they are dealt here",
            hint="a data set that deals itself goes into a DataLoader, which gives whole batches",
        )


def _digest(items: Any) -> str:
    return batch_digest(items) + repr(list(_plain(items)))


def _plain(items: Any) -> Iterator[Any]:
    """Yield the numbers and texts in nested items; tensors are digested elsewhere."""
    if isinstance(items, int | float | str | bytes):
        yield items
    elif isinstance(items, Mapping):
        for key in sorted(items, key=str):
            yield from _plain(items[key])
    elif isinstance(items, list | tuple):
        for item in items:
            yield from _plain(item)


# What of a Trainer's run the next start compares, and how named changes of it take effect.


def run_fingerprint(
    parts: Parts,
    callbacks: Sequence[Callback],
    objects: Mapping[str, object],
    *,
    subclass: object,
    train_dataset: Any,
    eval_dataset: Any,
    chooses: bool = False,
) -> dict[str, Any]:
    """Return the facts of a run that its objects do not hold: data, loss, callbacks, subclass.

    Those of data are functions that wait for their records to be read. Of data that each rank has
    of its own, rank 0 compares its part. `chooses`: evaluations say when the run ends, or which
    weights it ends with.
    """
    loss = {} if parts.loss_fn is None else callable_facts(parts.loss_fn)
    names = sorted(qualified_name(type(callback)) for callback in callbacks)
    facts = {name: _callback_facts(one) for name, one in named(callbacks).items()}
    groups: dict[str, Any] = {"loss": loss, "callbacks": {"names": names, **facts}}
    groups["state"] = _of_own_objects(objects)
    groups["trainer"] = _of_subclass(subclass, parts.scheduler)
    chooses |= any(one.get("stops", False) for one in facts.values())
    own = subclass if chooses and not _steers(parts.scheduler) else None
    groups["eval_data"] = _begin_evaluation_facts(eval_dataset, own)
    if parts.group.rank > 0 and gives_own_batches(parts.source, parts.group):
        return {**groups, "data": None}
    train = None
    if train_dataset is not None:
        keeps = keeps_generators(parts.source)
        train = begin_data_facts(train_dataset, parts.collate_fn, keeps_generators=keeps)
    return {**groups, "data": {} if train is None else train}


def _begin_evaluation_facts(eval_dataset: Any, subclass: object) -> Any:
    """Begin to take the facts of what evaluations come from, a subclass's own way among them."""
    begun = None if eval_dataset is None else begin_data_facts(eval_dataset)
    others = frozenset(name for base in type(subclass).__mro__ for name in vars(base))
    code = {} if subclass is None else subclass_facts(subclass, leave_out=others - {"evaluate"})
    own = {"trainer": code} if code.get("classes") else {}
    return own if begun is None else lambda: {**begun(), **own}


def _callback_facts(callback: Callback) -> dict[str, Any]:
    stops = any(names_in_class(callback, name) for name in ("stop", "stop_reason"))
    return {**object_facts(callback), **({"stops": True} if stops else {})}


def _of_own_objects(objects: Mapping[str, object]) -> dict[str, Any]:
    """Return the facts of the user's own classes in the state of the run, such as an average."""
    compared_elsewhere = (nn.Module, Optimizer, LRScheduler)
    return {
        name: object_facts(one)
        for name, one in objects.items()
        if is_user_code(type(one)) and not isinstance(one, compared_elsewhere)
    }


def _of_subclass(trainer_of_user: object, scheduler: LRScheduler) -> dict[str, Any]:
    """Return what a user's subclass trains by; evaluations count where they steer the rate."""
    left_out = _NOT_IN_A_STEP if _steers(scheduler) else _NOT_IN_A_STEP | {"evaluate"}
    return subclass_facts(trainer_of_user, leave_out=left_out)


def _steers(scheduler: LRScheduler) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau)


_NOT_IN_A_STEP = frozenset(
    ("__init__", "record", "save_checkpoint", "load_checkpoint", "state_dict", "load_state_dict")
)
"""Methods that a subclass may have in its own way, and the weights do not follow."""


def take_effect(
    parts: Parts, state: RunState, built: InitialHyperparameters, changed: Mapping[str, Difference]
) -> None:
    """Apply changed settings to the optimizer and schedule that the configuration made."""
    apply_settings(
        changed.values(),
        built,
        optimizer=parts.optimizer if parts.config_made_optimizer else None,
        scheduler=parts.scheduler if parts.config_made_schedule else None,
        options=OPTIMIZER_OPTIONS,
        of_schedule=SCHEDULE_SETTINGS,
        step=state.progress.step,
    )


def settle_length(parts: Parts, state: RunState) -> None:
    """Recount the length of the run from its position: earlier steps may have had another size."""
    steps = count_steps(state.config, parts.source, state.progress)
    if steps == state.max_steps:
        return
    state.max_steps = steps
    if parts.config_made_schedule and isinstance(parts.scheduler, LambdaLR):
        factor = factor_of(state.config, steps)
        parts.scheduler.lr_lambdas = [factor] * len(parts.scheduler.lr_lambdas)


# The Checkpointer of a Trainer: what the configuration says of it.


def run_directory(config: TrainerConfig, storage: Storage | None, group: Group) -> str | Storage:
    """Return where the run directory is.

    Raises:
        ConfigError: Checkpoints are to be compressed, but the library for it is not installed.
        RunDirectoryError: They are, and the directory cannot be made.
    """
    if not config.save_compressed:
        return config.output_dir if storage is None else storage
    with as_directory_error(config.output_dir):
        if storage is None:
            storage = LocalStorage(config.output_dir, create=group.rank == 0)
        return CompressedStorage(storage)


def objects_to_save(
    parts: Parts,
    state: RunState,
    window: Window,
    callbacks: Sequence[Callback],
    *,
    stateful_trainer: object | None,
    more: Mapping[str, object],
) -> dict[str, object]:
    """Return all that a checkpoint of a run holds, by name.

    Raises:
        ConfigError: If `more` uses a name that is taken, or holds what cannot be saved.
    """
    own = {
        "model": parts.model,
        "optimizer": parts.optimizer,
        "scheduler": parts.scheduler,
        "scaler": parts.precision.scaler,
        "data": parts.source,
        "statistics": state.statistics,
        "callbacks": with_state(callbacks),
        "gradients": window,
        "trainer": stateful_trainer,
    }
    known = [name for name, value in own.items() if name != "trainer" or value is not None]
    check_state(more, [*known, *TAKEN])
    return {n: value for n, value in {**own, **more}.items() if value is not None}


@dataclass(frozen=True)
class TrainerFacts:
    """What a run depends on besides the objects that are saved; the next start compares it.

    Attributes:
        settings: The user's own, in groups.
        types: Classes of namedtuples and enums inside saved state.
        fingerprint: Returns the facts of data, loss and callbacks.
        other_objects: Returns unregistered objects that may keep state of the run.
        one_data_set: Whether all ranks are given the same data, and share them out.
        of_users: Names of objects of the user's own, which may differ between ranks.
        processor_files: The files of a tokenizer, which each checkpoint holds too.
    """

    settings: Mapping[str, Mapping[str, Any]] | None
    types: Sequence[type]
    fingerprint: Callable[[], Mapping[str, Any]]
    other_objects: Callable[[], dict[str, object]]
    one_data_set: bool
    of_users: Collection[str]
    processor_files: Mapping[str, bytes]


def make_checkpointer(
    parts: Parts,
    state: RunState,
    objects: Mapping[str, object],
    facts: TrainerFacts,
    *,
    storage: Storage | None,
    note: Callable[[str], None],
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
) -> Checkpointer:
    """Return what saves and resumes a run; `note` is called with each line to show."""
    config = state.config
    by_config = {"optimizer": parts.config_made_optimizer, "scheduler": parts.config_made_schedule}
    return Checkpointer(
        run_directory(config, storage, parts.group),
        branch=config.branch,
        save_steps=config.save_steps,
        save=SavePolicy(
            minutes=config.save_minutes,
            max_lost_minutes=config.max_lost_minutes,
            mtbf_hours=config.mtbf_hours,
            mode=config.save_mode,
            layout=partial(_layout, facts.processor_files),
        ),
        keep=_keep_policy(config),
        types=facts.types,
        clock=Clock(monotonic=clock, wall=wall_clock),
        settings=RunFacts(
            settings=facts.settings,
            more=facts.fingerprint,
            filter=_examination(parts, state),
            made_by_settings=[name for name, is_made in by_config.items() if is_made],
            check_values=_check_values,
            other_objects=facts.other_objects,
            one_data_set=facts.one_data_set,
            reads_ahead=config.dataloader_num_workers > 0,
            is_complete=True,
        ),
        resume=ResumePolicy.of_trainer(config.allow, config.skip, config.exact_resume),
        # All is derived, so that the ranks have the same; but for what is the user's own.
        ranks=RankPolicy(parts.group, config.read_from, per_rank=(), may_differ=facts.of_users),
        tell=note,
        **objects,
    )


def _layout(files: Mapping[str, bytes], objects: Mapping[str, object]) -> Layout:
    usual = Layout.of(objects)
    return usual.with_files(lambda: files) if files else usual


def _check_values(values: Any) -> None:
    """Raise where the values of a checkpoint cannot come from a run.

    Raises:
        CorruptCheckpointError: Naming what is none.
    """
    if not isinstance(values, dict) or not isinstance(values.get("stop_reason"), str | None):
        found = repr(values)[:80]
        raise CorruptCheckpointError("values", "are not those of a run", found=found)
    Progress.of(values.get("progress"))


def _examination(parts: Parts, state: RunState) -> Examination:
    return Examination(
        state,
        parts.model,
        parts.source,
        parts.group,
        config_made_optimizer=parts.config_made_optimizer,
        config_made_schedule=parts.config_made_schedule,
        evaluations_steer=isinstance(parts.scheduler, ReduceLROnPlateau),
    )


def _keep_policy(config: TrainerConfig) -> KeepPolicy:
    """Return which checkpoints stay."""
    every = config.keep_every_n_steps
    return KeepPolicy(
        last=config.save_total_limit,
        every=() if every is None else (KeepEvery(every),),
    )


# Saving, resuming, and what is done with finished saves.


class RunCheckpoints:
    """Saves a run, says which saves are durable, and brings the run back.

    Attributes:
        display: As given; may be exchanged.
        is_loaded: Whether a checkpoint was just loaded, as a whole, and no step taken since.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        parts: Parts,
        state: RunState,
        *,
        call: CallHook,
        display: Display,
        pace: Pace,
        processor_files: Mapping[str, bytes],
    ) -> None:
        self._checkpointer = checkpointer
        self._parts = parts
        self._state = state
        self._call = call
        self.display = display
        self._pace = pace
        self._processor_files = processor_files
        self._saved: Progress | None = None
        self._best_is_loaded = self.is_loaded = False

    @property
    def is_saved(self) -> bool:
        """Whether the last save of this process holds where the run is."""
        return self._saved == self._state.progress

    def must_wait(self) -> bool:
        """Return whether an accumulation window is open that lanes or ranks share.

        What they have gathered so far is not summed up yet: a save has to wait for the step.
        """
        state = self._state
        shared = self._parts.group.world_size > 1 or state.config.lanes is not None
        return shared and state.progress.pending > 0

    def save(self) -> str:
        """Save everything as it is now; return the folder of the checkpoint.

        Raises:
            ConfigError: If the model holds its best weights: that is not the state of the run.
        """
        parts, state = self._parts, self._state
        if self._best_is_loaded:
            raise ConfigError("save_checkpoint", "the model holds its best weights, not its last")
        if state.progress == Progress():
            parts.begin_fresh(state.config.seed)
        self._checkpointer.best_step = state.statistics.best_step
        if parts.group.world_size > 1:
            parts.division.agree_on_buffers(parts.model)
        exchange_loader_states(parts.source, parts.group)
        values, facts = state.to_save()
        with parts.randomness.users_generators(), self._deterministic():
            path = self._checkpointer.save(state.progress.step, values, facts=facts)
        self._saved, state.save_requested = state.progress, False
        self.poll()
        return path

    def save_if_due(self, save: Callable[[], str]) -> None:
        """Save between two steps, where time, a request or the end of the run asks for it."""
        state = self._state
        is_due = self._checkpointer.should_save(state.progress.step)
        if is_due or state.save_requested or state.is_finished:
            save()

    def poll(self, *, wait: bool = False) -> None:
        """Call `on_save` for the checkpoints that became durable since the last call.

        Args:
            wait: Until all that was saved is durable.

        Raises:
            SaveError: What a save failed at.
        """
        if wait:
            self._checkpointer.wait()
        committed = self._checkpointer.poll()
        for path in committed:
            cost = self._checkpointer.last_save_cost
            self._pace.save_took(0.0 if cost is None else cost.durable)
            self._call("on_save", path)
        interval = self._checkpointer.save_interval
        if interval is not None:
            self.display.saves(interval, saved=bool(committed))

    def announce(self, event: dict[str, Any], line: str) -> None:
        """Write an event into the history of the run, and show a line."""
        self._checkpointer.note_event(event)
        self.display.note(line)

    def stopped(self, reason: str) -> TrainingStopped:
        """Return the end of a run that was asked to stop, when all that was saved is durable.

        Raises:
            SaveError: What a save failed at.
        """
        self.poll(wait=True)
        self._checkpointer.confirmation.stopped()
        end = TrainingStopped(self._state.progress.step, reason)
        self.announce({"event": "stopped", "step": end.step, "by": reason}, str(end))
        return end

    @contextmanager
    def noting_an_early_stop(self) -> Iterator[None]:
        """Show a note where a signal ends a start before its first step."""
        try:
            yield
        except TrainingStopped as end:
            if end.step is None:
                self.display.note(str(end))
            raise

    def training_begins(self) -> None:
        """Note that the objects no longer hold the state of one checkpoint."""
        self.is_loaded = self._best_is_loaded = False

    def load_best(self) -> None:
        """Put the best weights into the model, if asked for."""
        best = self._state.statistics.best_step
        if self._state.config.load_best_model_at_end and best is not None:
            self._checkpointer.load(best, ["model"])
            self._best_is_loaded = True

    def resume(self, which: ResumeFrom) -> ResumeReport:
        """Restore all state from a checkpoint. As `Checkpointer.resume`."""
        state, construction = self._state, self._parts.construction
        if ResumeChoice.parse(which).kind == "never" and state.progress != Progress():
            raise ConfigError("train", 'make a new Trainer for "never"', found=str(state.progress))
        self._parts.group.agree("the configuration", state.config.to_dict())
        with ExitStack() as stack:
            stack.callback(construction.initialise)  # unless a checkpoint brings weights
            stack.enter_context(self._deterministic())
            report = self._checkpointer.resume(which, ahead=construction.ahead)
            state.resume_report = report
            self._checkpointer.confirmation.on_found = state.note_found
            self._put_processor_files()
            if report.resumed:
                construction.has_weights()
        if report.resumed:
            self._bring_state_back(report)
        self.is_loaded = True
        return report

    def _put_processor_files(self) -> None:
        """Have the files of the tokenizer stand in the run directory, now that it is accepted."""
        if self._parts.group.rank == 0:
            for name, data in self._processor_files.items():
                self._checkpointer.run.put_file(name, data)

    def _deterministic(self) -> Any:
        if not self._state.config.full_determinism:
            return nullcontext()
        return deterministic_kernels(True, self._parts.device)

    def _bring_state_back(self, report: ResumeReport) -> None:
        """Restore the run state, and recompute what the configuration derives from it."""
        parts, state, values = self._parts, self._state, self._checkpointer.values
        changed = {difference.path: difference for difference in report.differences}
        state.progress = Progress.of(values.get("progress"))
        again = changed.keys() & ENDING_SETTINGS
        ends_otherwise = again or self._callbacks_end_otherwise()
        state.stop_reason = None if ends_otherwise else values.get("stop_reason")
        if changed.keys() & METRIC_SETTINGS:
            state.statistics.forget_best()
        micro = values.get("micro_batch_size")
        is_size = isinstance(micro, int) and micro > 0 and state.config.batch_size % micro == 0
        if parts.may_halve and isinstance(micro, int) and is_size:
            state.use_micro_batch(micro, parts.source)
        settle_length(parts, state)
        take_effect(parts, state, self._checkpointer.comparison.built, changed)

    def _callbacks_end_otherwise(self) -> bool:
        """Return whether a callback that may have ended the run has changed."""
        now = self._checkpointer.comparison.facts["fingerprint"]["callbacks"]
        return may_go_on(self._checkpointer.resumed_facts, now)
