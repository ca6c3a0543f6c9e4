"""One call of `Trainer.train`: its run directory, what it resumes, and what it saves."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.adapters.transformers.changes import (
    RULES,
    CallbackState,
    CurrentSettings,
    UserChoices,
    callback_states,
    facts_of_callbacks,
    named,
    plain_arguments,
    run_fingerprint,
)
from unbroken.adapters.transformers.checkpoint_files import (
    STATE_NAME,
    CheckpointFiles,
    state_from_json,
)
from unbroken.adapters.transformers.dataloader import (
    Beginning,
    are_counts,
    batch_size_of,
    batches_left,
    begin_at,
    data_state,
    is_drawn_from,
    is_of_host,
    keyed_loader,
    order_of,
    trail_of,
    unknown_order,
)
from unbroken.adapters.transformers.evaluations import (
    begin_evaluation_facts,
    what_evaluations_decide,
)
from unbroken.adapters.transformers.hf_checkpoint import (
    HfCheckpoints,
    facts_of_hf_checkpoint,
    load_hf_checkpoint,
    missing_devices_of_hf_checkpoint,
    position_of_hf_checkpoint,
    read_state,
    refuse_what_does_not_fit,
)
from unbroken.adapters.transformers.position import (
    Batching,
    DataPosition,
    LoopCounts,
    LoopStart,
    PositionCallback,
    StoredPosition,
    plan_loop_start,
)
from unbroken.capture import Stateful, capture_rng, how_cut, restore_rng, unwrapped
from unbroken.checkpoint import (
    Candidate,
    Checkpointer,
    Difference,
    Preemption,
    ResumeChoice,
    ResumeReport,
    RunFacts,
    SavePolicy,
    TrainingStopped,
    agreed_reason,
    may_go_on,
    origin_of,
)
from unbroken.distributed import Group, SingleProcess, join
from unbroken.errors import ConfigError, CorruptCheckpointError, StateMismatchError
from unbroken.fingerprint import names_in
from unbroken.store import KeepPolicy
from unbroken.stored_names import to_stored

# The losses that the host adds up between two lines of its log, and over the whole run.


class LossAccumulators:
    """Reads and sets what the host's loop keeps in attributes of its own."""

    def __init__(self, trainer: transformers.Trainer) -> None:
        self._trainer = trainer

    def values(self) -> dict[str, Any]:
        """Return the exact values."""
        trainer = self._trainer
        return {
            "since_log": float(trainer._tr_loss.item()),  # noqa: SLF001 (the host's own)
            "logged": float(trainer._total_loss_scalar),  # noqa: SLF001
            "last_logged": int(trainer._globalstep_last_logged),  # noqa: SLF001
            "first_step": int(getattr(trainer, "_initial_global_step", 0)),  # since 5.4
        }

    def bring_back(self, values: Mapping[str, Any]) -> None:
        """Restore it, so that the next log line and train_loss are those of the whole run."""
        trainer = self._trainer
        trainer._tr_loss.fill_(values["since_log"])  # noqa: SLF001
        trainer._total_loss_scalar = values["logged"]  # noqa: SLF001
        trainer._globalstep_last_logged = values["last_logged"]  # noqa: SLF001
        trainer._initial_global_step = values["first_step"]  # noqa: SLF001


def are_losses(values: Any) -> bool:
    """Return whether these are values of `LossAccumulators`."""
    kinds = {"since_log": float, "logged": float, "last_logged": int, "first_step": int}
    return isinstance(values, dict) and all(
        type(values.get(name)) is kind for name, kind in kinds.items()
    )


def no_losses(step: int) -> dict[str, Any]:
    """Return what the host begins with when it resumes at a step."""
    return {"since_log": 0.0, "logged": 0.0, "last_logged": step, "first_step": step}


_NOTE = "from transformers' Trainer; continues as that Trainer would"
_NAMES = ("path", "step")
_TRAINS = ("changed", "")  # what a rule does not know


class TrainSession:
    """The run that one call of `train` begins or continues.

    Args:
        trainer: The trainer.
        choices: What its caller said about resuming.
        requested: What to resume.
        subclass_facts: Returns what a user's subclass of the trainer does in a step.
        tell: Called with what a start or a save has to say.

    Attributes:
        checkpointer: Saves and resumes.
        position_callback: Knows the position in the data.
        report: What the start found; known once the host has built its optimizer.
        batching: How this start divides an epoch into batches and steps.
        shift: Steps done, less those that so much data makes as it is batched now.
        restarted: The position in an epoch that is begun again; None: none is.
        own_loader: The loader of the training data, if it is the user's own.
        stopping: What ends the process after one step more; None: nothing.
    """

    def __init__(
        self,
        trainer: transformers.Trainer,
        choices: UserChoices,
        requested: Any,
        subclass_facts: Callable[[], dict[str, Any]],
        tell: Callable[[str], None],
    ) -> None:
        self.trainer, self.choices = trainer, choices
        self._subclass_facts = subclass_facts
        self.report = ResumeReport(step=0)
        self.shift = 0
        self.restarted: DataPosition | None = None
        self.own_loader: Any = None
        self.saved_step: int | None = None
        self.stopping: TrainingStopped | None = None
        self._requested = requested
        self._restarts_epochs = trainer.args.ignore_data_skip
        self._stack = ExitStack()
        self.group: Group = join() if trainer.args.world_size > 1 else SingleProcess()
        self._loader: Any = None
        self._state: dict[str, Any] = {}
        self._stored: StoredPosition | None = None
        self._begins_again = False
        self._loop_start: LoopStart | None = None
        self._rng: dict[str, Any] | None = None
        self._adopted: dict[str, Any] | None = None
        self._is_back = self._has_workers = False
        self._callbacks: dict[str, Any] = {}
        self._began = time.monotonic()
        args = trainer.args
        self.batching = self._current_batching(None)
        self.position_callback = PositionCallback(self.batching.batch * self.batching.world_size)
        self.checkpointer = Checkpointer(
            args.output_dir,
            keep=KeepPolicy(last=args.save_total_limit),
            resume=choices.policy(is_named=ResumeChoice.parse(requested).kind in _NAMES),
            settings=RunFacts(
                more=self._fingerprint,
                filter=lambda facts, found: self._settings.differences(facts, found),
                made_by_settings=choices.made_by_arguments,
                check_values=_check_values,
                other_objects=self._other_objects,
                one_data_set=True,
                reads_ahead=True,
                is_complete=True,
            ),
            ranks=self.group,
            save=SavePolicy(mode=choices.save_mode, layout=CheckpointFiles(trainer).layout),
            tell=tell,
        )

    def _current_batching(self, length: int | None, batch_size: int | None = None) -> Batching:
        args = self.trainer.args
        by_host = self.trainer._train_batch_size  # noqa: SLF001 (auto_find_batch_size changes it)
        batch = by_host if batch_size is None else batch_size
        return Batching(batch, args.gradient_accumulation_steps, args.world_size, length)

    def __enter__(self) -> TrainSession:
        self._stack.callback(self.checkpointer.close)
        try:
            preemption = Preemption(clock=time.monotonic, wall_clock=time.time)
            self.preemption = self._stack.enter_context(preemption)
            self.candidate = self.checkpointer.choose(
                self._selection(), foreign=HfCheckpoints(), examine=self._read_position
            )
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def is_stopped(self) -> bool:
        """Whether a callback had ended the run before this start."""
        return self._stored is not None and self._stored.stopped[0]

    @property
    def folder(self) -> Path | None:
        """The checkpoint that the run continues from."""
        source, foreign = self.candidate.source, self.candidate.foreign
        if source is None:
            return None if foreign is None else foreign.path
        return Path(source.storage.describe(source.folder))

    def _selection(self) -> ResumeChoice:
        """Return what is asked for; a path may also be meant inside the output directory."""
        selection = ResumeChoice.parse(self._requested)
        if selection.path is None or selection.path.exists():
            return selection
        inside = Path(self.trainer.args.output_dir).absolute() / selection.path
        return replace(selection, path=inside) if inside.exists() else selection

    def _read_position(self, candidate: Candidate) -> None:
        """Read, verified, what the host counts by before it loads anything."""
        self._state, self._stored = {}, None
        if candidate.foreign is not None:
            self._state = read_state(candidate.foreign.path)
        source = candidate.source
        if source is None:
            return
        facts = source.manifest.facts
        if "place" not in facts:
            what = "was not saved by this Trainer: it does not say where in the data the run is"
            hint = "go on with what saved it, or train into another output_dir"
            raise StateMismatchError(source.storage.describe(source.folder), what, hint=hint)
        self._stored = StoredPosition.of(source.step, facts)
        self._state = state_from_json(source.read_file(STATE_NAME), source.step)
        if may_go_on(facts, facts_of_callbacks(self.trainer.callback_handler.callbacks)):
            self._stored = replace(self._stored, stopped=(False, False))

    def begin_again(self, older: Candidate) -> int | None:
        """Continue from an older checkpoint, because the one being loaded is damaged.

        The host then begins its loop once more, and makes a new schedule over the same optimizer.

        Returns:
            The batch size that the host had found then; None: it finds none.
        """
        self.candidate, self._begins_again = older, True
        self._loop_start, self.shift, self.restarted = None, 0, None
        self.position_callback.position = DataPosition()
        optimizer = self.checkpointer.objects["optimizer"]
        if isinstance(optimizer, Optimizer):
            self.checkpointer.comparison.built.set_learning_rates(optimizer)
        found = self._state.get("train_batch_size")
        return found if self.trainer.args.auto_find_batch_size else None

    @property
    def _settings(self) -> CurrentSettings:
        trainer = self.trainer
        state, begun = trainer.state, self.restarted
        steps = state.global_step, state.max_steps
        decides = what_evaluations_decide(trainer)
        return CurrentSettings(
            trainer.args, self.choices, self.batching, trainer.lr_scheduler, *steps, decides, begun
        )

    def _fingerprint(self) -> dict[str, Any]:
        trainer, loader = self.trainer, self.own_loader
        data = (trainer.train_dataset, trainer.data_collator) if loader is None else (loader,)
        callbacks = trainer.callback_handler.callbacks
        evaluations = {"eval_data": begin_evaluation_facts(trainer)}
        facts = run_fingerprint(data, trainer.compute_loss_func, callbacks)
        return {**facts, **evaluations, "trainer": self._subclass_facts()}

    def _facts_to_save(self) -> dict[str, Any]:
        """Return what the next start compares, and needs to know before it has built anything."""
        state, control = self.trainer.state, self.trainer.control
        is_stopped = bool(control.should_training_stop and state.global_step < state.max_steps)
        stopped = (is_stopped, bool(control.should_epoch_stop))
        position = StoredPosition(
            state.global_step, self.position_callback.position, self.batching, self.shift, stopped
        )
        return {
            "arguments": plain_arguments(self.trainer.args),
            "host": "transformers",
            "max_steps": state.max_steps,
            **position.facts(),
        }

    # What follows is called by the host's loop, in this order.

    def loader(self, base: Any) -> Any:
        """Return the loader of the training data with batches that continue at any position."""
        args = self.trainer.args
        self.own_loader = None if is_of_host(base, self.trainer.train_dataset) else base
        self.batching = self._current_batching(None, batch_size_of(self.own_loader))
        self._loader = keyed_loader(
            base,
            seed=args.seed if args.data_seed is None else args.data_seed,
            rank=args.process_index,
            world_size=args.world_size,
            ahead=args.gradient_accumulation_steps,
        )
        return self._loader

    @property
    def continued_loader(self) -> Any:
        """What `loader` returned last."""
        return self._loader

    def adjusted_counts(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the host's loop counts, adjusted to the position of the run."""
        counts = LoopCounts(*values)
        args = self.trainer.args
        self.batching = replace(self.batching, length=_length(self._loader.dataset))
        self.position_callback.samples_per_batch = self.batching.batch * self.batching.world_size
        if self.folder is not None and self._stored is None:
            self._stored = position_of_hf_checkpoint(
                self.folder, self._state, self.batching, counts, drop_last=args.dataloader_drop_last
            )
        if self._stored is None:
            return values
        self._restart_epoch_if_asked(counts)
        left = batches_left(self._loader, self._stored.position.samples)
        by_epochs = args.max_steps <= 0
        self._loop_start, counts = plan_loop_start(
            self._stored, self.batching, counts, left, by_epochs=by_epochs
        )
        self.shift = self._loop_start.shift
        self.position_callback.position = self._loop_start.position
        if self._loop_start.position.batches % self.batching.accumulation:
            refuse_own_windows(type(self.trainer))
        return tuple(getattr(counts, name) for name in LoopCounts.__dataclass_fields__)

    def _restart_epoch_if_asked(self, counts: LoopCounts) -> None:
        """Begin the epoch again, if that is asked for in the middle of one."""
        if self._stored is None or not self._restarts_epochs:
            return
        position = self._stored.position
        if not position.is_over and 0 < position.batches < counts.batches_per_epoch:
            self.restarted = position
            self._stored = replace(self._stored, position=DataPosition(position.epoch))

    def state_from_checkpoint(self) -> tuple[int, int]:
        """Load the host's stored state; return where its loop begins."""
        if self._loop_start is None:
            return 0, 0
        state = self.trainer.state
        for name in _STATE:
            if name in self._state:
                setattr(state, name, self._state[name])
        best = state.best_global_step
        if best is not None and Path(self.checkpointer.path(best)).is_dir():
            state.best_model_checkpoint = self.checkpointer.path(best)
        return self._loop_start.epoch, self._loop_start.batches

    def resume(self) -> None:
        """Restore all objects, now that the host has built them."""
        self.trainer.current_flos = 0  # of steps since the last save, if an exception ended those
        self.checkpointer.register(**self._objects())
        scheduler: Any = self.checkpointer.objects["scheduler"]
        wrapped = getattr(scheduler, "optimizer", None)
        if wrapped is not None:
            scheduler.optimizer = self.checkpointer.objects["optimizer"]
        if self._begins_again and isinstance(scheduler, LRScheduler):
            self.checkpointer.comparison.built.note_schedule(scheduler)
        try:
            self._resume_or_import()
        finally:
            if wrapped is not None:
                scheduler.optimizer = wrapped
        self._rng = capture_rng()
        states: Mapping[str, CallbackState] = self.checkpointer.objects["callbacks"]  # type: ignore[assignment]
        self._callbacks = {name: copy.deepcopy(one.state_dict()) for name, one in states.items()}

    def _resume_or_import(self) -> None:
        arguments = plain_arguments(self.trainer.args)
        of_all = {n: v for n, v in arguments.items() if RULES.get(n, _TRAINS)[0] != "harmless"}
        self.group.agree("TrainingArguments", of_all)
        foreign = self.candidate.foreign
        if foreign is not None and self._stored is not None:
            self.report = self._import_hf_checkpoint(foreign.path, self._stored)
            return
        self.report = self.checkpointer.resume(self.candidate)
        self._apply(self.report.differences)

    def _apply(self, differences: tuple[Difference, ...]) -> None:
        built = self.checkpointer.comparison.built
        self._settings.apply(differences, self.checkpointer.objects, built)

    def _import_hf_checkpoint(self, folder: Path, stored: StoredPosition) -> ResumeReport:
        """Load a checkpoint of transformers' own Trainer and save it as one of unbroken.

        Args:
            folder: The checkpoint.
            stored: Its position.

        Raises:
            DifferenceError: The training changed, and the change is not named.
            StateMismatchError: The checkpoint does not fit the objects.
        """
        checkpointer, group, checkpoint = self.checkpointer, self.group, str(folder)
        objects = checkpointer.objects
        if how_cut(objects) is not None:
            hint = "resume it once under DDP or on one process: from then on it is one of ours"
            what = "a checkpoint of transformers' own Trainer cannot be put into a sharded model"
            raise StateMismatchError(checkpoint, what, hint=hint)
        checkpointer.comparison.record_current_facts()
        differences = self._differences_from_hf(folder, stored)
        checkpointer.comparison.refuse(checkpoint, differences)
        # The host draws the order of an epoch before it brings back its random states.
        order = {"before": capture_rng()}
        self._adopted = {"loss": no_losses(stored.step), "order": order, "seconds": 0.0}
        group.run_on_all("check the checkpoint", lambda: refuse_what_does_not_fit(folder, objects))
        load_hf_checkpoint(folder, objects, rank=group.rank)
        self._apply(differences)
        source = origin_of(folder, HfCheckpoints())
        checkpointer.import_state(
            stored.step, self._adopted, facts=self._facts_to_save(), source=source
        )
        rejected = self.candidate.rejected
        return ResumeReport(
            stored.step, checkpoint, rejected, differences=differences, notes=(_NOTE,)
        )

    def _differences_from_hf(self, folder: Path, stored: StoredPosition) -> tuple[Difference, ...]:
        facts = facts_of_hf_checkpoint(folder)
        found = unknown_order(self._loader, stored.position)
        if stored.batching is not None:
            facts["cut"] = to_stored(stored.batching)
            facts["arguments"]["gradient_accumulation_steps"] = stored.batching.accumulation
            was, now = stored.batching.world_size, self.batching.world_size
            if was != now:
                effect = "sums run in another order, and dropout draws otherwise"
                found = (*found, Difference("world_size", was, now, effect, "equivalent"))
            else:
                found = (*found, *self.checkpointer.buckets.differences({}))
        missing = missing_devices_of_hf_checkpoint(folder, rank=self.group.rank)
        if missing is not None:
            effect = "random numbers on these devices differ from here on"
            found = (*found, Difference("rng.cuda", *missing, effect, "changed"))
        return self._settings.differences(facts, found)

    def _objects(self) -> dict[str, Any]:
        trainer = self.trainer
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
        scaler = getattr(trainer.accelerator, "scaler", None)
        return {
            "model": unwrapped(trainer.model),
            "optimizer": getattr(optimizer, "optimizer", optimizer),
            "scheduler": getattr(scheduler, "scheduler", scheduler),
            **({} if scaler is None else {"scaler": scaler}),
            "callbacks": callback_states(trainer.callback_handler.callbacks),
            **({"trainer": trainer} if isinstance(trainer, Stateful) else {}),
        }

    def _other_objects(self) -> dict[str, object]:
        """Return unregistered objects that may keep state of the run."""
        trainer = self.trainer
        callbacks = named(trainer.callback_handler.callbacks).items()
        return {
            "trainer": trainer,
            "data": trainer.train_dataset,
            "collate_fn": trainer.data_collator,
            "loss": trainer.compute_loss_func,
            **{f"callbacks.{name}": one for name, one in callbacks},
        }

    def epoch_begins(self, epoch: int) -> None:
        """Prepare an epoch; before the first one of a resumed run, restore the rest."""
        if self._is_back or self._loop_start is None:
            self.position_callback.position = DataPosition(epoch)
            self.restore_after_host_reset()
            self._workers_begin()
            return
        samples = self._loop_start.position.samples if self._loop_start.in_samples else None
        stored = self.values["order"]
        order = stored if self._loop_start.batches else {}
        reseeded = {"seed", "data_seed"} & {one.path for one in self.report.differences}
        seeds = {} if reseeded else stored.get("seeds", {})
        given = {"data": self.values.get("data"), "seeds": seeds, "trail": self._trail()}
        place = (epoch, self._loop_start.batches, samples, order, stored)
        begin_at(self._loader, Beginning(*place, **given))
        self.restore_after_host_reset()
        self._workers_begin()
        if "before" in order:  # the host restores its own after the first batch
            restore_rng(order["before"])

    def _trail(self) -> Mapping[str, Any]:
        """Return the digests that the data must match, unless other data are accepted."""
        named = (name.partition(".")[0] for name in self.choices.allow)
        changed = (d for d in self.report.differences if d.verdict in ("changed", "not covered"))
        groups = {*named, *(one.path.partition(".")[0] for one in changed)}
        is_other = groups & {"data", "seed", "data_seed"}
        return {} if is_other else self._trail_of_this_rank()

    def _trail_of_this_rank(self) -> Mapping[str, Any]:
        trails = self.values.get("trails") or []
        if self.group.world_size == 1:
            return {} if trails else self.values.get("trail", {})
        return trails[self.group.rank] if len(trails) == self.group.world_size else {}

    def _workers_begin(self) -> None:
        """Note the state of the data set of which worker processes get a copy."""
        args = self.trainer.args
        lasting = args.dataloader_persistent_workers and self._has_workers
        if args.dataloader_num_workers and not lasting:
            self._has_workers = True
            self.checkpointer.attributes.workers_begin()

    def restore_after_host_reset(self) -> None:
        """Restore, once, what the host resets when it begins to train."""
        if self._is_back:
            return
        self._is_back = True
        if self._stored is None:
            self.checkpointer.attributes.restore(again=True)
            return
        LossAccumulators(self.trainer).bring_back(self.values["loss"])
        states = self.checkpointer.objects["callbacks"]
        for name, state in self._callbacks.items():
            states[name].load_state_dict(copy.deepcopy(state))  # type: ignore[index]
        self.checkpointer.attributes.restore(again=True)
        stopped, control = self._stored.stopped, self.trainer.control
        ends = self.trainer.state.global_step >= self.trainer.state.max_steps
        control.should_training_stop |= stopped[0] or ends
        control.should_epoch_stop |= stopped[1]
        self.restore_random_states()

    def restore_random_states(self) -> None:
        """Set all generators to what the checkpoint has of them."""
        if self._rng is not None:
            restore_rng(self._rng)

    def first_batches(self, requested: int) -> int:
        """Return how many batches the host is to fetch: less where a window is half done."""
        done = self.position_callback.position.batches % self.batching.accumulation
        return min(requested, self.batching.accumulation - done)

    # What follows is called at the edges of steps.

    def end_of_step(self) -> str | None:
        """Rehearse a save once, raise what a save in the background failed at; return why to stop.

        None: go on, as at the end of the run, too.
        """
        state = self.trainer.state
        self.checkpointer.rehearse(state.global_step, self._values)
        self.checkpointer.poll()  # raises the error of a background save
        if state.global_step >= state.max_steps or self.trainer.control.should_training_stop:
            return None
        return agreed_reason(self.group, self.preemption.reason())

    def note(self, logs: Mapping[str, Any]) -> None:
        """Write one line of statistics; numbers alone."""
        numbers = {k: v for k, v in logs.items() if isinstance(v, bool | int | float)}
        self.checkpointer.log({"step": self.trainer.state.global_step, **numbers})

    def load_best(self) -> None:
        """Put the weights of the best checkpoint into the model, verified."""
        best = self.trainer.state.best_global_step
        if best is not None:
            self.checkpointer.load(best, ("model",))

    def save(self) -> str:
        """Save everything as it is now; return the folder of the checkpoint."""
        trainer = self.trainer
        trainer.store_flos()
        self.checkpointer.wait()  # the best one may be on its way
        state, best = trainer.state, trainer.state.best_global_step
        if best is not None:
            path = self.checkpointer.path(best)
            state.best_model_checkpoint = (
                path if best == state.global_step or Path(path).is_dir() else None
            )
        self.checkpointer.best_step = best
        self.saved_step = state.global_step
        facts, values = self._facts_to_save(), self._values()
        if self.group.world_size > 1:  # each rank reads a part of its own
            trails = self.group.gather("what was read", values["trail"])
            values |= {"trail": {}, "trails": trails}
        return self.checkpointer.save(state.global_step, values, facts=facts)

    def _values(self) -> dict[str, Any]:
        position = self.position_callback.position
        return {
            "loss": LossAccumulators(self.trainer).values(),
            "order": order_of(self._loader),
            "data": data_state(self._loader, position.epoch, position.batches),
            "trail": trail_of(self._loader, position.epoch, position.batches),
            "seconds": self.seconds,
        }

    @property
    def seconds(self) -> float:
        """How long all starts of the run have trained, as far as checkpoints know."""
        return self.seconds_before + time.monotonic() - self._began

    @property
    def seconds_before(self) -> float:
        """How long the starts before this one have trained."""
        return 0.0 if self.values is None else float(self.values["seconds"])

    @property
    def values(self) -> Any:
        """The plain values of the checkpoint that was resumed."""
        return self._adopted or self.checkpointer.values


def _check_values(values: Any) -> None:
    """Raise where the values of a checkpoint are none that a run of this Trainer has saved.

    Raises:
        CorruptCheckpointError: Naming what is none.
    """
    found = values if isinstance(values, dict) else {}
    order, trail, seconds = (found.get(name) for name in ("order", "trail", "seconds"))
    trails = found.get("trails", [])
    are_right = {
        "loss": are_losses(found.get("loss")),
        "order": isinstance(order, dict)
        and ("own" not in order or is_drawn_from(order))
        and are_counts(order.get("asked", []))
        and isinstance(seeds := order.get("seeds", {}), dict)
        and all(type(seed) is int for seed in seeds.values()),
        "trail": trail is None or isinstance(trail, dict),
        "trails": isinstance(trails, list) and all(isinstance(one, dict) for one in trails),
        "seconds": isinstance(seconds, int | float),
    }
    for name, is_right in are_right.items():
        if not is_right:
            what = "is not what a run of this Trainer saves"
            raise CorruptCheckpointError(f"values.{name}", what)


_STATE = (
    *("epoch", "global_step", "num_input_tokens_seen", "total_flos", "log_history"),
    *("best_metric", "best_global_step", "train_batch_size"),
)
"""What of the host's stored state goes on; all else follows from the arguments of this start."""


def refuse_own_windows(kind: type) -> None:
    """Raise where a subclass fetches the batches of a step, and the next step has fewer of them.

    Raises:
        ConfigError: Its `get_batch_samples` does not call that of the class above.
    """
    own: Any = kind.get_batch_samples  # type: ignore[attr-defined]
    if own.__module__ == __name__.rpartition(".")[0] + ".trainer" or "super" in names_in(own):
        return
    middle = "the checkpoint is in the middle of a step"
    what = f"does not call super(): {middle}, and only the remaining batches must be fetched"
    hint = "call super().get_batch_samples(...), or resume from a checkpoint between two steps"
    raise ConfigError(own.__qualname__, what, hint=hint)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # it is endless, or nobody knows
        return None
