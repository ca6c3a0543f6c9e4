"""Trainer: the training loop, which any kill may interrupt and the same command continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar, overload

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.capture import Stateful, files_of_processor
from unbroken.checkpoint import (
    Cadence,
    Checkpointer,
    Preemption,
    ResumeFrom,
    ResumeReport,
    Timer,
    TrainingStopped,
    agreed_reason,
)
from unbroken.checkpoint.arguments import check_kinds
from unbroken.data import MicroBatch
from unbroken.data.worker_signals import is_end_of_a_worker
from unbroken.distributed import Group
from unbroken.errors import ConfigError
from unbroken.storage import Storage
from unbroken.training.callback import Callback, Hooks, named
from unbroken.training.checkpoints import (
    RunCheckpoints,
    TrainerFacts,
    check_first_step_batches,
    make_checkpointer,
    objects_to_save,
    run_fingerprint,
)
from unbroken.training.config import TrainerConfig
from unbroken.training.display import Display
from unbroken.training.evaluation import Evaluation
from unbroken.training.micro_batches import LossFn
from unbroken.training.run_state import (
    Pace,
    Progress,
    Statistics,
    StepResult,
    TrainResult,
    Window,
)
from unbroken.training.setup import (
    Given,
    MakeModel,
    build_parts,
    deterministic_kernels,
    joined,
    pick_display,
)
from unbroken.training.step import OomRetry, StepRunner, keep_freed_memory
from unbroken.verification import StepVerifier, Subject

T = TypeVar("T")


class RunStateAttribute(Generic[T]):
    """An attribute of a Trainer that is one of its `RunState`, by the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, trainer: None, owner: type) -> RunStateAttribute[T]: ...

    @overload
    def __get__(self, trainer: Trainer, owner: type) -> T: ...

    def __get__(self, trainer: Trainer | None, owner: type) -> RunStateAttribute[T] | T:
        if trainer is None:
            return self
        value: T = getattr(trainer._run_state, self._name)  # noqa: SLF001 (the one that it stands for)
        return value

    def __set__(self, trainer: Trainer, value: T) -> None:
        setattr(trainer._run_state, self._name, value)  # noqa: SLF001


class Trainer:
    """Trains a model; killed at any moment and started again, it is the same run, bit for bit.

    What the bits depend on is derived from (seed, position), or captured in each checkpoint.

    Args:
        model: Any module, in DistributedDataParallel or not; a Hugging Face model returns its own
            loss. It is moved to the device. Or a function that makes it: where a checkpoint is
            there, a model is then made without drawing first weights, as far as it allows that,
            and the checkpoint is read meanwhile.
        config: All settings.
        train_dataset: A map-style data set; or an iterable of micro-batches, resumed through
            its `state_dict`, or else by counting and skipping.
        eval_dataset: A map-style data set, or an iterable of batches.
        callbacks: Called at the edges of steps; their state is saved.
        optimizer: None: the one that the configuration names.
        scheduler: None: the one that the configuration names. Stepped with the optimizer; a
            ReduceLROnPlateau after each evaluation.
        processing_class: A tokenizer, or anything else with `save_pretrained(folder)`: its files
            are saved in the run directory and in each checkpoint, so that `from_pretrained`
            finds it there; `unbroken export` takes them along.
        collate_fn: Makes a batch of samples; None: PyTorch's default.
        loss_fn: Called as `loss_fn(outputs, labels)`; None: the model returns its loss.
        state: More objects to save, by name: an EMA model, a `torch.Generator`, and so on.
        settings: More settings that the training depends on, in groups: {"model": {...}}.
            They are compared on resume as those of `config` are.
        types: Classes of namedtuples and enums inside saved state.
        storage: Where the run directory is; None: `output_dir` on the local disk.
        display: None: a progress bar on a terminal, lines elsewhere; on other ranks nothing.
        group: The ranks that train together. None: those of torchrun's environment.
        clock: Monotonic seconds.
        wall_clock: Seconds since 1970.

    Raises:
        ConfigError: If settings and arguments do not fit together.
        DataError: If the data set is empty or shorter than a batch.

    Example:
        >>> import tempfile, torch
        >>> from unbroken.training import NoDisplay
        >>> data = [(torch.tensor([float(i)]), torch.tensor([2.0 * i])) for i in range(8)]
        >>> config = TrainerConfig(output_dir=tempfile.mkdtemp(), max_steps=2, batch_size=4)
        >>> trainer = Trainer(
        ...     nn.Linear(1, 1), config, data, loss_fn=nn.MSELoss(), display=NoDisplay()
        ... )
        >>> trainer.train().progress.samples
        8
    """

    config = RunStateAttribute[TrainerConfig]()
    max_steps = RunStateAttribute[int]()
    progress = RunStateAttribute[Progress]()
    statistics = RunStateAttribute[Statistics]()
    stop_reason = RunStateAttribute["str | None"]()
    save_requested = RunStateAttribute[bool]()
    resume_report = RunStateAttribute[ResumeReport]()

    def __init__(
        self,
        model: nn.Module | MakeModel,
        config: TrainerConfig | None = None,
        train_dataset: Any = None,
        *,
        eval_dataset: Any = None,
        callbacks: Sequence[Callback] = (),
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        processing_class: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        loss_fn: LossFn | None = None,
        state: Mapping[str, object] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        types: Sequence[type] = (),
        storage: Storage | None = None,
        display: Display | None = None,
        group: Group | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        check_kinds(group=group, callbacks=callbacks, types=types, settings=settings, state=state)
        check_kinds(clock=clock, wall_clock=wall_clock)
        self.group = group = joined(config) if group is None else group
        display = pick_display(display, group)
        given = Given(model, train_dataset, optimizer, scheduler, collate_fn, loss_fn, storage)
        self._parts, self._run_state = parts, run_state = build_parts(
            given, config or TrainerConfig(), group, on_skip=display.skipping
        )
        self.device, self.division, self.model = parts.device, parts.division, parts.model
        self.optimizer, self.scheduler = parts.optimizer, parts.scheduler
        self.precision, self.source = parts.precision, parts.source
        self.eval_dataset, self.randomness = eval_dataset, parts.randomness
        self._clock, self._wall_clock, self._counted_until = clock, wall_clock, clock()
        self._hooks = hooks = Hooks(self, callbacks, run_state, parts.randomness)
        self.window = window = Window(parts.model, parts.division)
        retry = OomRetry(parts, run_state, window, hooks, self._announce)
        self._verifier = self._make_verifier(state or {})
        self._step_runner = StepRunner(parts, run_state, window, self.call, retry, self._verifier)
        self._at_edge = False
        self._stopping: TrainingStopped | None = None  # raised after one step more
        self.pace = Pace(clock)
        logging = Cadence(self.config.logging_steps, self.config.logging_minutes)
        self._log_timer = Timer(logging, clock)
        self._evaluation = Evaluation(parts, run_state, clock)
        facts = self._facts(settings, types, train_dataset, state or {}, processing_class)
        self.checkpointer = self._make_checkpointer(state or {}, facts, storage, display.note)
        self._run_checkpoints = RunCheckpoints(
            self.checkpointer,
            parts,
            run_state,
            call=self.call,
            display=display,
            pace=self.pace,
            processor_files=facts.processor_files,
        )

    @property
    def callbacks(self) -> list[Callback]:
        """The callbacks of the run; more may be added."""
        return self._hooks.callbacks

    @callbacks.setter
    def callbacks(self, callbacks: list[Callback]) -> None:
        self._hooks.callbacks = callbacks

    @property
    def display(self) -> Display:
        """What shows the run."""
        return self._run_checkpoints.display

    @display.setter
    def display(self, display: Display) -> None:
        self._run_checkpoints.display = display

    def train(self, resume_from_checkpoint: ResumeFrom = None) -> TrainResult:
        """Train from the newest intact checkpoint, or from the start, to the end of the run.

        Args:
            resume_from_checkpoint: As `Checkpointer.resume` takes it; None: what the
                configuration says ("auto" by default).

        Returns:
            How the run ended.

        Raises:
            TrainingStopped: After a save, if a signal or a deadline asked for a stop; left
                alone, it ends the process with exit status 75.
            CheckpointError: If the checkpoint asked for cannot be used.
            SaveError: If a checkpoint could not be saved; earlier ones are as they were.
        """
        self._refuse_missing_evaluation_data()
        state, checkpoints = self._run_state, self._run_checkpoints
        with self._session() as preemption:
            self._begin(resume_from_checkpoint)
            self.pace.step_begins()
            with self.randomness.keyed():
                for micro_batches in self._micro_batches_of_steps(preemption):
                    preemption.training_begins()
                    if self._run_step(micro_batches) is None:
                        continue  # it did not fit into memory: again, in smaller micro-batches
                    self._count_time()
                    checkpoints.poll()
                    self._at_edge = True  # a save that a callback asks for now is made below
                    self.call("on_step_end")
                    state.agree_on_requests(self.group)
                    self._log_if_due()
                    self._evaluate_if_due()
                    state.agree_on_requests(self.group)
                    self._at_edge = False
                    checkpoints.save_if_due(self.save_checkpoint)  # it holds all of the above
                    self.display.advance(state.progress.step)
                    self._stop_if_asked(preemption)
            checkpoints.poll(wait=True)
            checkpoints.load_best()
            self.call("on_train_end")
        report, best = state.resume_report, state.statistics.best_metric
        return TrainResult(state.progress, state.stop_reason, best, report)

    @contextmanager
    def _session(self) -> Iterator[Preemption]:
        """Open what a run needs while it trains, and close or restore it on leaving."""
        with ExitStack() as stack:
            stack.push(self.checkpointer)
            stack.callback(self.display.close)
            stack.callback(self._parts.batches.close)
            stack.enter_context(deterministic_kernels(self.config.full_determinism, self.device))
            keep_freed_memory(self.device)
            limit, clock = self.config.max_seconds(), self._clock
            preemption = Preemption(max_seconds=limit, clock=clock, wall_clock=self._wall_clock)
            stack.enter_context(preemption)
            stack.enter_context(self._run_checkpoints.noting_an_early_stop())
            yield preemption

    def _begin(self, which: ResumeFrom) -> None:
        state, checkpoints = self._run_state, self._run_checkpoints
        self._stopping = None
        if self._verifier is not None:
            self._verifier.forget()
        if which is not None or not checkpoints.is_loaded:
            self.load_checkpoint(state.config.resume_from_checkpoint if which is None else which)
        checkpoints.training_begins()
        self._counted_until = self._clock()
        report = state.resume_report
        self.display.report(report)
        if report.resumed and state.is_finished:
            self.display.note(state.already_over())
        self.display.start(total=state.max_steps, step=state.progress.step)
        if not report.resumed:
            self._parts.begin_fresh(state.config.seed)
            if state.config.save_at_start:
                self.save_checkpoint()
        self.division.agree_on_the_beginning(self.model, state.max_steps)
        self.call("on_train_begin")
        self.checkpointer.attributes.restore(again=True)

    def _micro_batches_of_steps(self, preemption: Preemption) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of one optimizer step after the other, until the end."""
        windows = self._windows(preemption)
        return check_first_step_batches(windows, self.source, self.division)

    def _windows(self, preemption: Preemption) -> Iterator[list[MicroBatch]]:
        state, source = self._run_state, self._parts.batches
        if state.is_finished:
            return
        batches, size = source.iterate(), state.config.per_forward
        while not state.is_finished:
            if size != state.config.per_forward:  # the last step did not fit into memory
                batches, size = source.iterate(), state.config.per_forward
            missing = source.shape.accumulation - state.progress.pending
            try:
                window = list(islice(batches, missing))
            except RuntimeError as error:
                self._stop_without_workers(error, preemption.reason())
                raise
            yield window

    def _stop_without_workers(self, error: RuntimeError, reason: str | None) -> None:
        """Save and stop, if what asks for a stop has killed workers that were still starting."""
        is_whole = self.group.world_size == 1 and self.progress.pending == 0
        if reason is not None and is_whole and is_end_of_a_worker(error):
            raise self._saved_stop(reason)

    def _run_step(self, micro_batches: list[MicroBatch]) -> StepResult | None:
        """Take a step; where a stop was saved already, it only leaves a record to compare with."""
        if self._stopping is None:
            return self._step_runner.run(micro_batches)
        with suppress(Exception):  # all that matters is durable, however this step ends
            self._step_runner.run(micro_batches)
        raise self._stopping

    def _stop_if_asked(self, preemption: Preemption) -> None:
        self.pace.step_is_over()
        preemption.margin_seconds = self.pace.seconds_to_stop()
        reason = agreed_reason(self.group, preemption.reason())
        if reason is not None and not self._run_state.is_finished:
            self._stopping = self._saved_stop(reason)
            if not self.config.confirm_stops:
                raise self._stopping

    def _saved_stop(self, reason: str) -> TrainingStopped:
        """Return what ends the process, when the state is durable."""
        if not self._run_checkpoints.is_saved:
            self.save_checkpoint()
        return self._run_checkpoints.stopped(reason)

    def _log_if_due(self) -> None:
        state = self._run_state
        if not self._log_timer.due(state.progress.step) and not state.is_finished:
            return
        self._count_time()
        record = {**state.position(), **state.statistics.log(state.progress)}
        self.record(record)
        self._log_timer.done()
        self.call("on_log", record)

    def _evaluate_if_due(self) -> None:
        """Evaluate; the best so far may ask for a save, and too long without it ends the run."""
        state = self._run_state
        if not self._evaluation.is_due():
            return
        metrics = self._evaluation.metrics(self.evaluate)
        self.record({**state.position(), **metrics})
        is_best = self._evaluation.judge(metrics)
        if (reason := self._evaluation.reason_to_stop()) is not None:
            self.stop(reason)
        self.call("on_evaluate", metrics)
        state.save_requested |= is_best and state.config.load_best_model_at_end

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback; what they draw depends on the position in the run."""
        self._hooks.call(hook, *arguments)

    def record(self, record: Mapping[str, Any]) -> None:
        """Write one line of statistics, and show it."""
        if self._verifier is not None and self._verifier.is_repeating:
            return  # it was written when this pass was first run
        self.checkpointer.log(record)
        self.display.statistics(self.progress.step, record)

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the model on the evaluation data; the run is not changed by it.

        Override it to add metrics of your own; `metric_for_best_model` may name any of them.
        """
        return {"eval_loss": self._evaluation.mean_loss(self.eval_dataset)}

    def stop(self, reason: str = "stop() was called") -> None:
        """End the run after the current step, as if it had reached `max_steps`."""
        self.stop_reason = reason

    def save_checkpoint(self) -> str:
        """Save everything as it is now into the run directory; return the checkpoint's folder.

        Inside an accumulation window the gradients so far are saved with it; with ranks or lanes
        the step is finished first. Asked for between two steps, by a callback, it is made when
        all that belongs to the step has happened.
        """
        verifier = self._verifier
        is_verifying = verifier is not None and verifier.is_busy
        if self._at_edge or is_verifying or self._run_checkpoints.must_wait():
            self.save_requested = True
            # At the edge of a step this step is saved; inside of one, the step that it ends in.
            return self.checkpointer.path(self.progress.step + (not self._at_edge))
        self._count_time()
        if verifier is not None:
            verifier.compare_resting(self.progress.step)
        return self._run_checkpoints.save()

    def load_checkpoint(self, which: ResumeFrom = "latest") -> ResumeReport:
        """Restore all state, as `Checkpointer.resume` does; `train` continues from there."""
        if self._verifier is not None:
            self._verifier.forget()
        return self._run_checkpoints.resume(which)

    def _refuse_missing_evaluation_data(self) -> None:
        """Raise before the first step, and not at the first evaluation hours later.

        Raises:
            ConfigError: If evaluation is asked for, has no data, and is not the user's own.
        """
        evaluate = getattr(self.evaluate, "__qualname__", "")
        if self.config.evaluates and self.eval_dataset is None and evaluate == "Trainer.evaluate":
            raise ConfigError("eval_dataset", "is needed for eval_steps or eval_minutes")

    def _facts(
        self,
        settings: Mapping[str, Mapping[str, Any]] | None,
        types: Sequence[type],
        dataset: Any,
        state: Mapping[str, object],
        processor: Any,
    ) -> TrainerFacts:
        return TrainerFacts(
            settings,
            types,
            fingerprint=partial(self._fingerprint, dataset),
            other_objects=self._other_objects,
            one_data_set=hasattr(dataset, "__getitem__"),
            of_users=("callbacks", "scheduler", "trainer", *state),
            processor_files={} if processor is None else files_of_processor(processor),
        )

    def _make_checkpointer(
        self,
        more: Mapping[str, object],
        facts: TrainerFacts,
        storage: Storage | None,
        note: Callable[[str], None],
    ) -> Checkpointer:
        stateful = self if isinstance(self, Stateful) else None
        own = (self._parts, self._run_state, self.window, self.callbacks)
        return make_checkpointer(
            self._parts,
            self._run_state,
            objects_to_save(*own, stateful_trainer=stateful, more=more),
            facts,
            storage=storage,
            note=note,
            clock=self._clock,
            wall_clock=self._wall_clock,
        )

    def _other_objects(self) -> dict[str, object]:
        """Return unregistered objects that may keep state of the run."""
        callbacks = {f"callbacks.{name}": one for name, one in named(self.callbacks).items()}
        return {"trainer": self, "loss": self._parts.loss_fn, **callbacks}

    def _fingerprint(self, dataset: Any) -> dict[str, Any]:
        objects = {**self.checkpointer.objects, **self.checkpointer.attributes.bare}
        return run_fingerprint(
            self._parts,
            self.callbacks,
            {name: one for name, one in objects.items() if one is not self},
            subclass=self,
            train_dataset=dataset,
            eval_dataset=self.eval_dataset,
            chooses=self.config.chooses_by_evaluations,
        )

    def _make_verifier(self, more: Mapping[str, object]) -> StepVerifier | None:
        every = self.config.verify_steps
        if every is None:
            return None
        tell = lambda line: self.display.note(line)  # noqa: E731 (the display may be exchanged)
        return StepVerifier(every, self.group, partial(self._subject, more), tell)

    def _subject(self, more: Mapping[str, object]) -> Subject:
        """Return what is verified in a step."""
        return Subject(
            self._parts.forward,
            self.optimizer,
            {**more, **self._other_objects()},
            has_user_code=bool(self.callbacks) or type(self) is not Trainer,
            is_deterministic=self.config.full_determinism,
            unobserved=self.checkpointer.confirmation.observer.paused,
        )

    def _announce(self, event: dict[str, Any], line: str) -> None:
        self.checkpointer.confirmation.rounds_otherwise()
        self._run_checkpoints.announce(event, line)

    def _count_time(self) -> None:
        """Add the seconds since the last call to the run's."""
        before, self._counted_until = self._counted_until, self._clock()
        self._run_state.statistics.seconds += self._counted_until - before
