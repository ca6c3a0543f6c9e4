"""Trainer: the training loop, which any kill may interrupt and the same command continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from unbroken.capture import files_of_processor
from unbroken.checkpoint import (
    Cadence,
    Checkpointer,
    Preemption,
    ResumeFrom,
    ResumeReport,
    Selection,
    Timer,
    TrainingStopped,
)
from unbroken.checkpoint.arguments import check_kinds
from unbroken.checkpoint.preemption import agreed_reason
from unbroken.data import BatchSource, MicroBatch, derive_key
from unbroken.data.worker_signals import is_end_of_a_worker
from unbroken.distributed import Group
from unbroken.errors import ConfigError, DeviceMemoryError
from unbroken.storage import Storage
from unbroken.stored_names import to_stored
from unbroken.training import rank_agreement
from unbroken.training.callback import Callback, overridden
from unbroken.training.config import TrainerConfig
from unbroken.training.display import Display
from unbroken.training.gradient_sums.data_parallel import Division, without_ddp
from unbroken.training.memory import keep_freed_memory
from unbroken.training.metrics import DataDigest, Statistics
from unbroken.training.model_init import Construction, MakeModel
from unbroken.training.oom_retry import Halving, is_out_of_memory
from unbroken.training.optim import make_optimizer, make_scheduler, refuse_closures
from unbroken.training.per_rank_loaders import rightly_dealt, tell_places
from unbroken.training.progress import Pace, Progress, TrainResult, count_steps, epoch_at
from unbroken.training.rank_agreement import agree_on_buffers, shared_metrics
from unbroken.training.resume import already_over, go_on, run_fingerprint
from unbroken.training.rng import Randomness, deterministic_kernels
from unbroken.training.setup import (
    for_loader,
    for_ranks,
    joined,
    make_checkpointer,
    make_evaluator,
    make_ready,
    make_source,
    make_stepper,
    pick_device,
    pick_display,
    place_of_run,
    prepared_for_forward,
    refuse_missing_evaluation_data,
    refuse_to_save,
)
from unbroken.training.step import LossFn, Precision, Window, tokens_of

# How a Trainer saves: what stands in a checkpoint, who hears of it, the save before a stop.


class FilesBeside:
    """The files of a tokenizer, beside the weights of each checkpoint and in the run directory.

    Args:
        checkpointer: What saves the run.
        processor: The tokenizer, or anything with `save_pretrained(folder)`; None: there is none.

    Raises:
        ConfigError: It has no such method.
    """

    def __init__(self, checkpointer: Checkpointer, processor: object) -> None:
        self._checkpointer = checkpointer
        self._files = {} if processor is None else files_of_processor(processor)
        if self._files:
            usual = checkpointer.layout
            checkpointer.layout = lambda of: usual(of).with_files(lambda: self._files)

    def put_into_the_run(self) -> None:
        """Have them stand in the run directory; done by rank 0, once the start is accepted.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        if self._checkpointer.group.rank == 0:
            for name, data in self._files.items():
                self._checkpointer.run.put_file(name, data)


def save_now(trainer: Trainer) -> str:
    """Save everything as it is now; return the folder of the checkpoint."""
    trainer.checkpointer.best_step = trainer.statistics.best_step
    values, facts = _what_to_save(trainer)
    deterministic = deterministic_kernels(trainer.config.full_determinism, trainer.device)
    with trainer.randomness.ambient(), deterministic:
        return trainer.checkpointer.save(trainer.progress.step, values, facts=facts)


def _what_to_save(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values that `go_on` needs, and the facts that the next start compares."""
    agree_on_buffers(trainer)
    tell_places(trainer.source, trainer.group)
    progress = to_stored(trainer.progress)
    values = {
        "progress": progress,
        "stop_reason": trainer.stop_reason,
        "micro_batch_size": trainer.config.per_forward,
    }
    config = trainer.config.to_dict()
    return values, {"progress": progress, "config": config, "max_steps": trainer.max_steps}


def hear_of_saves(trainer: Trainer, *, wait: bool = False) -> None:
    """Tell of the checkpoints that became durable since the last call.

    Args:
        trainer: The trainer.
        wait: Until all that was saved is durable.

    Raises:
        SaveError: What a save failed at.
    """
    if wait:
        trainer.checkpointer.wait()
    committed = trainer.checkpointer.committed()
    for path in committed:
        cost = trainer.checkpointer.cost
        trainer.pace.save_took(0.0 if cost is None else cost.durable)
        trainer.call("on_save", path)
    cadence = trainer.checkpointer.cadence
    if cadence is not None:
        trainer.display.saves(cadence, saved=bool(committed))


@contextmanager
def telling_of_an_early_stop(trainer: Trainer) -> Iterator[None]:
    """Say it where a signal ends a start before its first step."""
    try:
        yield
    except TrainingStopped as end:
        if end.step is None:
            trainer.display.note(str(end))
        raise


def stopped(trainer: Trainer, reason: str) -> TrainingStopped:
    """Return the end of a run that was asked to stop, told when all that was saved is durable.

    Raises:
        SaveError: What a save failed at.
    """
    hear_of_saves(trainer, wait=True)
    end = TrainingStopped(trainer.progress.step, reason)
    trainer.checkpointer.note_event({"event": "stopped", "step": end.step, "by": reason})
    trainer.display.note(str(end))
    return end


# Evaluations in the middle of a run, and what follows from them.


def place_of(trainer: Trainer) -> dict[str, Any]:
    """Return where the run is, for a line of statistics."""
    return {"step": trainer.progress.step, "epoch": round(trainer.progress.epoch, 6)}


def eval_is_due(trainer: Trainer) -> bool:
    """Return whether to evaluate now; the ranks need not see the same time."""
    due = trainer.eval_timer.due(trainer.progress.step)
    return due if trainer.config.eval_minutes is None else trainer.group.any(due)


def evaluate_and_judge(trainer: Trainer) -> bool:
    """Evaluate, and do what follows from it; return whether the model is the best so far."""
    config, step = trainer.config, trainer.progress.step
    trainer.randomness.seed(derive_key(config.seed, "evaluate", step))
    own = {name: float(value) for name, value in _evaluated(trainer).items()}
    metrics = shared_metrics(trainer.group, own)
    trainer.eval_timer.done()
    trainer.record({**place_of(trainer), **metrics})
    best = trainer.statistics.consider(metrics, step, config)
    if isinstance(trainer.scheduler, ReduceLROnPlateau):
        trainer.scheduler.step(metrics[config.metric_for_best_model])
    patience = config.early_stopping_patience
    if patience is not None and trainer.statistics.evaluations_without_gain >= patience:
        trainer.stop(f"early stopping: {patience} evaluations without a better metric")
    trainer.call("on_evaluate", metrics)
    return best


def _evaluated(trainer: Trainer) -> dict[str, float]:
    """Return the metrics.

    Raises:
        DeviceMemoryError: If there is not memory enough for it.
    """
    try:
        return trainer.evaluate()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = trainer.config.eval_batch_size or trainer.config.per_forward
        raise DeviceMemoryError(
            f"evaluation after step {trainer.progress.step}",
            f"does not fit into the memory of {trainer.device}",
            found=f"eval_batch_size {size}: {error}",
            hint=f"choose a smaller portion: eval_batch_size={max(1, size // 2)}",
        ) from error


def load_best(trainer: Trainer) -> bool:
    """Put the best weights into the model, if asked for; return whether they are there now."""
    best = trainer.statistics.best_step
    if not trainer.config.load_best_model_at_end or best is None:
        return False
    trainer.checkpointer.load(best, ["model"])
    return True


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
        callbacks: Followers of the run; their state is saved.
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
        >>> from unbroken.training import Silence
        >>> data = [(torch.tensor([float(i)]), torch.tensor([2.0 * i])) for i in range(8)]
        >>> config = TrainerConfig(output_dir=tempfile.mkdtemp(), max_steps=2, batch_size=4)
        >>> trainer = Trainer(
        ...     nn.Linear(1, 1), config, data, loss_fn=nn.MSELoss(), display=Silence()
        ... )
        >>> trainer.train().progress.samples
        8
    """

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
        self.group = joined(config) if group is None else group
        config = config or TrainerConfig()
        self.device = pick_device(config.device, self.group)
        in_place = self.device.type == "cpu" and self.group.world_size == 1
        self._construction = Construction(model, config, storage, reads_ahead=in_place)
        model = without_ddp(self._construction.model, self.group)
        self.division = Division.of(model, self.group)
        config = for_loader(config, train_dataset, self.division)
        self.config = config = for_ranks(config, self.division)
        self._construction.make_room(self.device)
        self.model = model = model.to(self.device)
        self.eval_dataset = eval_dataset
        self.callbacks = list(callbacks)
        self.precision = Precision(config, self.device)
        self.display = pick_display(display, self.group)
        self.source = None
        if train_dataset is not None:
            skipping = self.display.skipping
            self.source = make_source(train_dataset, config, collate_fn, skipping, self.division)
        self.max_steps = count_steps(config, self.source)
        self.optimizer = make_optimizer(model, config) if optimizer is None else optimizer
        refuse_closures(self.optimizer)
        self.has_own_optimizer, self.has_own_schedule = optimizer is None, scheduler is None
        if scheduler is None:
            scheduler = make_scheduler(self.optimizer, config, self.max_steps)
        self.scheduler = scheduler
        self.portions = Halving(self)
        self.statistics, self.progress = Statistics(), Progress()
        self.resume_report = ResumeReport(step=0)
        self._is_loaded = False
        self._clock, self._wall_clock, self._counted_until = clock, wall_clock, clock()
        self._forward = prepared_for_forward(model, config)
        self.randomness = Randomness(cuda=self.device.type == "cuda")
        self.window = Window(model, self.division)
        self._stepper = make_stepper(self, self._forward, loss_fn, self.randomness)
        self._evaluator = make_evaluator(self, self._forward, collate_fn, loss_fn)
        self._data_digest = DataDigest(self.statistics, self.division)
        self.stop_reason: str | None = None
        self._saved: Progress | None = None
        self._at_edge = self.save_wanted = self._best_is_loaded = False
        self.pace = Pace(clock)
        self._log_timer = Timer(Cadence(config.logging_steps, config.logging_minutes), clock)
        self.eval_timer = Timer(Cadence(config.eval_steps, config.eval_minutes), clock)
        fingerprint = partial(run_fingerprint, self, train_dataset, collate_fn, loss_fn)
        place = place_of_run(config, storage, self.group)
        self.checkpointer = make_checkpointer(
            self, place, state or {}, settings, types, fingerprint, loss_fn, clock, wall_clock
        )
        self.checkpointer.comparison.one_data_set = hasattr(train_dataset, "__getitem__")
        self.checkpointer.ahead = self._construction.ahead
        self.checkpointer.gives_all = True
        self._files_beside = FilesBeside(self.checkpointer, processing_class)

    @property
    def _batches(self) -> BatchSource:
        if self.source is None:
            raise ConfigError("train_dataset", "is needed for training")
        return self.source

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
        refuse_missing_evaluation_data(self)
        with ExitStack() as stack:
            stack.push(self.checkpointer)
            stack.callback(self.display.close)
            stack.callback(self._batches.close)
            stack.enter_context(deterministic_kernels(self.config.full_determinism, self.device))
            keep_freed_memory(self.device)
            limit, clock = self.config.max_seconds(), self._clock
            preemption = Preemption(max_seconds=limit, clock=clock, wall_clock=self._wall_clock)
            stack.enter_context(preemption)
            stack.enter_context(telling_of_an_early_stop(self))
            report = self._begin(resume_from_checkpoint)
            self._loop(preemption)
            hear_of_saves(self, wait=True)
            self._best_is_loaded = load_best(self)
            self.call("on_train_end")
            return TrainResult(self.progress, self.stop_reason, self.statistics.best_metric, report)

    def _loop(self, preemption: Preemption) -> None:
        self.pace.step_begins()
        with self.randomness.keyed():
            for micro_batches in rightly_dealt(self, self._windows(preemption)):
                preemption.training_begins()
                if not self._train_step(micro_batches):
                    continue
                self._at_step_edge()
                self.pace.step_is_over()
                preemption.margin_seconds = self.pace.seconds_to_stop()
                reason = agreed_reason(self.group, preemption.reason())
                if reason is not None and not self._finished():
                    self._stop(reason)

    def _windows(self, preemption: Preemption) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of one optimizer step after the other, until the end."""
        if self._finished():
            return
        batches, size = self._batches.from_(), self.config.per_forward
        while not self._finished():
            if size != self.config.per_forward:  # the last step did not fit into memory
                batches, size = self._batches.from_(), self.config.per_forward
            missing = self._batches.shape.accumulation - self.progress.pending
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
            self._stop(reason)

    def _finished(self) -> bool:
        return self.progress.step >= self.max_steps or self.stop_reason is not None

    def _train_step(self, micro_batches: list[MicroBatch]) -> bool:
        """Return whether the step was taken; else it is to be tried again in smaller portions."""
        tokens_before = self.progress.tokens
        run = partial(self._stepper.run, micro_batches, after_each=self._after_micro_batch)
        stepped = self.portions.attempt(run)
        if stepped is None:
            return False
        if self.division.parts > 1:
            self.progress = replace(self.progress, tokens=tokens_before + self.window.tokens)
            self._data_digest.step_is_over()
        self.progress = self.progress.after_step(epoch_at(self.progress, self._batches))
        self.statistics.add_step(stepped)
        self._count_time()
        return True

    def _after_micro_batch(self, micro: MicroBatch) -> None:
        self._batches.used(micro)
        if self.config.log_data_digest:
            self._data_digest.add(micro.data)
        self.progress = self.progress.after_micro_batch(
            samples=micro.after.samples, tokens=tokens_of(micro.data)
        )
        self.call("on_micro_batch_end")

    def _at_step_edge(self) -> None:
        """Do what is due between two steps; saving comes last and so holds all the rest."""
        hear_of_saves(self)
        step, self._at_edge = self.progress.step, True
        self.call("on_step_end")
        rank_agreement.agree_on_wishes(self)
        if self._log_timer.due(step) or self._finished():
            self._log()
        if self.config.evaluates and (eval_is_due(self) or self._finished()):
            improved = evaluate_and_judge(self)
            self.save_wanted |= improved and self.config.load_best_model_at_end
        rank_agreement.agree_on_wishes(self)
        self._at_edge = False
        if self.checkpointer.is_due(step) or self.save_wanted or self._finished():
            self.save_checkpoint()
        self.display.advance(step)

    def _log(self) -> None:
        self._count_time()
        self.record(record := {**place_of(self), **self.statistics.log(self.progress)})
        self._log_timer.done()
        self.call("on_log", record)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback; what they draw depends on the place in the run alone."""
        calls = overridden(self.callbacks, hook)
        if calls:
            key = derive_key(self.config.seed, hook, self.progress.samples)
            with self.randomness.keyed_by(key):
                for call in calls:
                    call(self, *arguments)

    def record(self, record: Mapping[str, Any]) -> None:
        """Write one line of statistics, and show it."""
        self.checkpointer.log(record)
        self.display.statistics(self.progress.step, record)

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the model on the evaluation data; the run is not changed by it.

        Override it to add metrics of your own; `metric_for_best_model` may name any of them.
        """
        self._construction.initialise()
        return {"eval_loss": self._evaluator.mean_loss(self.eval_dataset)}

    def stop(self, reason: str = "stop() was called") -> None:
        """End the run after the current step, as if it had reached `max_steps`."""
        self.stop_reason = reason

    def save_checkpoint(self) -> str:
        """Save everything as it is now into the run directory; return the checkpoint's folder.

        Inside an accumulation window the gradients so far are saved with it; with ranks or lanes
        the step is finished first. Asked for between two steps, by a callback, it is made when
        all that belongs to the step has happened.
        """
        if self._at_edge or rank_agreement.is_in_shared_window(self):
            self.save_wanted = True
            return self.checkpointer.path(self.progress.step + (not self._at_edge))
        refuse_to_save(best_is_loaded=self._best_is_loaded)
        if self.progress == Progress():
            make_ready(self)
        self._count_time()
        path = save_now(self)
        self._saved, self.save_wanted = self.progress, False
        hear_of_saves(self)
        return path

    def load_checkpoint(self, which: ResumeFrom = "latest") -> ResumeReport:
        """Put a saved state into everything; `train` goes on there. As `Checkpointer.resume`."""
        if Selection.parse(which).kind == "never" and self.progress != Progress():
            raise ConfigError("train", 'make a new Trainer for "never"', found=str(self.progress))
        self.group.agree("the configuration", self.config.to_dict())
        with ExitStack() as stack:
            stack.callback(self._construction.initialise)  # unless a checkpoint brings weights
            stack.enter_context(deterministic_kernels(self.config.full_determinism, self.device))
            report = self.resume_report = self.checkpointer.resume(which)
            self._files_beside.put_into_the_run()
            if report.resumed:
                self._construction.has_weights()
        if report.resumed:
            go_on(self, report)
        self._is_loaded = True
        return report

    def _begin(self, which: ResumeFrom) -> ResumeReport:
        if which is not None or not self._is_loaded:
            self.load_checkpoint(self.config.resume_from_checkpoint if which is None else which)
        self._is_loaded = False  # what is in memory after this start is no whole checkpoint
        self._best_is_loaded = False
        self._counted_until = self._clock()
        self.display.report(self.resume_report)
        if self.resume_report.resumed and self._finished():
            self.display.note(already_over(self))
        self.display.start(total=self.max_steps, step=self.progress.step)
        if not self.resume_report.resumed:
            make_ready(self)
            if self.config.save_at_start:
                self.save_checkpoint()
        rank_agreement.agree_on_the_beginning(self)
        self.call("on_train_begin")
        self.checkpointer.attributes.restore(again=True)
        return self.resume_report

    def _stop(self, reason: str) -> NoReturn:
        if self._saved != self.progress:
            self.save_checkpoint()
        raise stopped(self, reason)

    def _count_time(self) -> None:
        """Add the seconds since the last call to the run's."""
        before, self._counted_until = self._counted_until, self._clock()
        self.statistics.seconds += self._counted_until - before
