"""Where a run is and what it reports about itself: counters, window, statistics, pace, result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from unbroken.capture import capture_gradients, restore_gradients
from unbroken.checkpoint import Difference, ResumeReport
from unbroken.data import BatchSource, MapSource, MicroBatch
from unbroken.distributed import Group
from unbroken.distributed.dtensors import whole
from unbroken.errors import ConfigError, CorruptCheckpointError, DataError, one_of
from unbroken.stored_names import from_stored, stored_name, to_stored
from unbroken.training.config import TrainerConfig
from unbroken.training.data_parallel import DataParallelLayout
from unbroken.training.micro_batches import tokens_of, weight_of

# How far a run is: the only counters of the loop, immutable.


@dataclass(frozen=True)
class Progress:
    """The point that a run has reached.

    Attributes:
        step: Completed optimizer steps; 0 is the untrained model.
        samples: Training samples used, pending ones of an accumulation window included.
        tokens: Tokens used; 0 where the data has none (no `input_ids`).
        pending: Micro-batches of the unfinished step whose gradients are in the model.
        epoch: Completed passes over the data, with the started one as a fraction.

    Example:
        >>> progress = Progress().after_micro_batch(samples=8, tokens=512)
        >>> progress.after_step(epoch=0.25)
        Progress(step=1, samples=8, tokens=512, pending=0, epoch=0.25)
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    pending: int = 0
    epoch: float = 0.0

    @classmethod
    def of(cls, stored: object) -> Progress:
        """Return what a checkpoint says; None: it says nothing, as before the first step.

        Raises:
            CorruptCheckpointError: No run can be there.
        """
        numbers = {} if stored is None else stored
        names = [*to_stored(cls())]
        if not isinstance(numbers, Mapping) or not all(
            name in names and _counts(value, is_whole=name != "epoch")
            for name, value in numbers.items()
        ):
            what = "is not how far a run can be"
            raise CorruptCheckpointError("progress", what, expected=names, found=stored)
        progress: Progress = from_stored(cls, numbers)
        return progress

    def after_micro_batch(self, *, samples: int, tokens: int) -> Progress:
        """Return the progress after one more forward and backward pass.

        Args:
            samples: All samples used by then.
            tokens: Tokens in this micro-batch.
        """
        return Progress(self.step, samples, self.tokens + tokens, self.pending + 1, self.epoch)

    def after_step(self, epoch: float) -> Progress:
        """Return the progress after the optimizer's step."""
        return Progress(self.step + 1, self.samples, self.tokens, 0, epoch)


def _counts(value: object, *, is_whole: bool) -> bool:
    kinds = (int,) if is_whole else (int, float)
    return type(value) in kinds and 0 <= value < math.inf and value < 2**63  # type: ignore[operator]


# How many optimizer steps a run has, and in which epoch it is.


def count_steps(
    config: TrainerConfig, source: BatchSource | None, progress: Progress | None = None
) -> int:
    """Return the optimizer steps of the whole run.

    Args:
        config: `max_steps`, or else `num_train_epochs`.
        source: Knows the length of an epoch.
        progress: Where the run is; steps so far may have been of another size.

    Raises:
        ConfigError: If only `num_train_epochs` is given and an epoch has no known length.
    """
    if config.max_steps != -1:
        return config.max_steps
    if source is None:
        return 0
    if source.steps_per_epoch is None:
        raise ConfigError("max_steps", "must be given: the length of an epoch is not known")
    # By its decimal digits: 0.1 epochs of 10 steps are one step, not 1.00000000000000000555.
    steps = Fraction(repr(float(config.num_train_epochs))) * source.steps_per_epoch
    if progress is None or source.samples_per_epoch is None:
        return math.ceil(steps)
    in_whole_steps = progress.samples - progress.pending * config.per_forward
    left = steps - Fraction(in_whole_steps, config.batch_size)
    return progress.step + max(0, math.ceil(left))


def epoch_at(progress: Progress, source: BatchSource) -> float:
    """Return the passes over the data when the step that is just being taken is completed."""
    if source.samples_per_epoch is not None:
        return progress.samples / source.samples_per_epoch
    if source.steps_per_epoch is not None:
        return float((progress.step + 1) / source.steps_per_epoch)
    return float(source.position.epoch)


# How long steps and saves take: what is needed to stop in time.


class Pace:
    """Remembers the slowest step and the slowest save of this process.

    Example:
        >>> now = [0.0]
        >>> pace = Pace(lambda: now[0])
        >>> now[0] = 2.0
        >>> pace.step_is_over()
        >>> pace.save_took(0.5)
        >>> pace.seconds_to_stop()
        3.0
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slowest_step = self._slowest_save = 0.0
        self._began = clock()

    def step_begins(self) -> None:
        """Take the time from here."""
        self._began = self._clock()

    def step_is_over(self) -> None:
        """Count what came since the last step: reading, training, evaluating, saving."""
        now = self._clock()
        self._slowest_step = max(self._slowest_step, now - self._began)
        self._began = now

    def save_took(self, seconds: float) -> None:
        """Count a save."""
        self._slowest_save = max(self._slowest_save, seconds)

    def seconds_to_stop(self) -> float:
        """Return how long before a deadline to stop: one more step, and a save twice as slow."""
        return self._slowest_step + 2 * self._slowest_save


# What `Trainer.train` returns.


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        progress: Where it ended.
        stopped_by: Why it ended before `max_steps`, or None.
        best_metric: The best value of `metric_for_best_model`, or None.
        resume_report: How this process's part of the run began.
    """

    progress: Progress
    stopped_by: str | None
    best_metric: float | None
    resume_report: ResumeReport


# The accumulation window: what the micro-batches of one optimizer step have gathered so far.


@stored_name("unbroken.training.window.Window")
class Window:
    """What an unfinished optimizer step has gathered: gradients, loss, number of labels.

    It is part of the state of a run, so that a save inside the window loses nothing; at a step
    edge it is empty.

    Attributes:
        loss: The weighted mean loss of the micro-batches so far, or None before the first.
        tokens: Tokens in the step, of all ranks.
    """

    def __init__(self, model: nn.Module, division: DataParallelLayout) -> None:
        self.loss: Tensor | None = None
        self._model = model
        self._weight = 0
        self._division = division
        self.tokens = 0

    def shares(self, micro_batches: Sequence[MicroBatch]) -> list[float]:
        """Return each micro-batch's share of the step's mean loss.

        Each label counts the same, in whatever micro-batch it stands. (Equal shares would give
        the labels of short sequences more weight: transformers#34191.)
        """
        if len(micro_batches) == 1 and self.loss is None and self._division.parts == 1:
            return [1.0]  # alone in its step
        weights = [weight_of(micro.data, micro.samples) for micro in micro_batches]
        if self.loss is None:
            tokens = sum(tokens_of(micro.data) for micro in micro_batches)
            total = self._division.sum([float(sum(weights)), float(tokens)])
            self._weight, self.tokens = map(int, total)
        return [weight / max(1, self._weight) for weight in weights]

    def add(self, loss: Tensor) -> None:
        """Count the loss of one micro-batch, already multiplied by its share."""
        loss = whole(loss.detach())
        self.loss = loss if self.loss is None else self.loss + loss

    def take_loss(self) -> Tensor:
        """Return the loss since the last call."""
        if self.loss is None:
            raise DataError("batch", "a lane has no micro-batch")
        loss, self.loss = self.loss, None
        return loss

    def put_back(self) -> Callable[[], None]:
        """Return what brings loss and counts back to what they are now; gradients are not here."""
        loss, weight, tokens = self.loss, self._weight, self.tokens

        def put_back() -> None:
            self.loss, self._weight, self.tokens = loss, weight, tokens

        return put_back

    def clear(self) -> None:
        """Begin the next window."""
        self.loss, self._weight = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients by parameter name, the loss and the labels in all."""
        gradients = capture_gradients(self._model)
        return {"parameters": gradients, "loss": self.loss, "weight": self._weight}

    def check_state_dict(self, state: Any) -> None:
        """Raise unless `load_state_dict` can take a state.

        Raises:
            CorruptCheckpointError: It is not what `state_dict` returns.
        """
        own = {"parameters": dict, "loss": Tensor | None, "weight": int}
        if not isinstance(state, dict) or not all(
            name in state and isinstance(state[name], kind) for name, kind in own.items()
        ):
            raise CorruptCheckpointError("gradients", "are no window", expected=[*own])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; parameters without a gradient have none."""
        restore_gradients(self._model, state["parameters"])
        self.loss, self._weight = state["loss"], state["weight"]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss: The mean loss over all labels of the batch, on the device of the model.
        grad_norm: The norm of the gradients before clipping; None without clipping.
        learning_rate: The learning rate of the first parameter group in this step.
    """

    loss: Tensor
    grad_norm: Tensor | None
    learning_rate: float


# What a run reports about itself; part of its state, so that nothing is counted twice.


_NUMBER, _COUNT, _TEXT = (int, float), (int,), (str,)
_KINDS: Mapping[str, tuple[tuple[type, ...], bool]] = {
    "best_metric": (_NUMBER, True),
    "best_step": (_COUNT, True),
    "evaluations_without_gain": (_COUNT, False),
    "seconds": (_NUMBER, False),
    "data_digest": (_TEXT, True),
    "loss_sum": (_NUMBER, False),
    "steps": (_COUNT, False),
    "grad_norm": (_NUMBER, True),
    "learning_rate": (_NUMBER, False),
    "logged_tokens": (_COUNT, False),
    "logged_seconds": (_NUMBER, False),
}
"""Each part of the state: its kinds, and whether it may be None."""


@stored_name("unbroken.training.statistics.Statistics")
class Statistics:
    """Sums since the last log line, the best metric, and the wall time of all segments.

    The loss is summed in float64 on its own device: no synchronisation per step.
    """

    def __init__(self) -> None:
        self.best_metric: float | None = None
        self.best_step: int | None = None
        self.evaluations_without_gain = 0
        self.seconds = 0.0
        self.data_digest: str | None = None
        self.loss_sum: Tensor | float = 0.0
        self.steps = 0
        self.grad_norm: Tensor | float | None = None
        self.learning_rate = 0.0
        self.logged_tokens = 0
        self.logged_seconds = 0.0

    def add_step(self, step: StepResult) -> None:
        """Count one optimizer step."""
        self.loss_sum = self.loss_sum + step.loss.to(torch.float64)
        self.grad_norm = step.grad_norm
        self.learning_rate = step.learning_rate
        self.steps += 1

    def add_data(self, digests: Iterable[str]) -> None:
        """Take the digests of micro-batches into the running digest of all data used.

        The digest is a chain, so that one short text is its whole state:
        digest = xxh3-128(previous digest, digest of a micro-batch).
        """
        for one in digests:
            self.data_digest = xxhash.xxh3_128(
                f"{self.data_digest or ''}{one}".encode()
            ).hexdigest()

    def log(self, progress: Progress) -> dict[str, Any]:
        """Return the mean loss, gradient norm and speed since the last call, and reset them."""
        tokens = progress.tokens
        seconds = self.seconds - self.logged_seconds
        record: dict[str, Any] = {
            "samples": progress.samples,
            "tokens": tokens,
            "learning_rate": self.learning_rate,
            "loss": float(self.loss_sum) / max(1, self.steps),
        }
        if self.grad_norm is not None:
            record["grad_norm"] = float(self.grad_norm)
        if self.data_digest is not None:
            record["data_digest"] = self.data_digest
        record["seconds"] = round(self.seconds, 3)
        if tokens and seconds > 0:
            record["tokens_per_second"] = round((tokens - self.logged_tokens) / seconds, 1)
        self.loss_sum, self.steps = 0.0, 0
        self.logged_tokens, self.logged_seconds = tokens, self.seconds
        return record

    def consider(self, metrics: Mapping[str, float], step: int, config: TrainerConfig) -> bool:
        """Take note of an evaluation; return whether it is the best so far.

        Raises:
            ConfigError: If `metric_for_best_model` is not among the metrics.
        """
        name = config.metric_for_best_model
        if name not in metrics:
            raise ConfigError("metric_for_best_model", expected=one_of(sorted(metrics)), found=name)
        gain = self._gain(float(metrics[name]), config.greater_is_better)
        gained = gain is None or gain > config.early_stopping_threshold  # NaN is no gain
        self.evaluations_without_gain = 0 if gained else self.evaluations_without_gain + 1
        if (gain is not None and not gain > 0) or math.isnan(float(metrics[name])):
            return False
        self.best_metric, self.best_step = float(metrics[name]), step
        return True

    def forget_best(self) -> None:
        """Forget the best metric: it was of another kind."""
        self.best_metric, self.best_step, self.evaluations_without_gain = None, None, 0

    def _gain(self, value: float, greater_is_better: bool) -> float | None:
        """Return how much better `value` is than the best so far; None when it is the first."""
        if self.best_metric is None or math.isnan(self.best_metric):
            return None
        return value - self.best_metric if greater_is_better else self.best_metric - value

    def state_dict(self) -> dict[str, Any]:
        """Return everything, the unfinished sums included."""
        values = {name: getattr(self, name) for name in _KINDS}
        grad_norm = None if self.grad_norm is None else float(self.grad_norm)
        return {**values, "loss_sum": float(self.loss_sum), "grad_norm": grad_norm}

    def check_state_dict(self, state: Any) -> None:
        """Raise unless `load_state_dict` can take a state.

        Raises:
            CorruptCheckpointError: It is not what `state_dict` returns.
        """
        own = self.state_dict()
        if not isinstance(state, dict) or not own.keys() <= state.keys():
            raise CorruptCheckpointError("statistics", "lack a number", expected=[*own])
        for name in own:
            kinds, may_be_none = _KINDS[name]
            value = state[name]
            if not (isinstance(value, kinds) or (may_be_none and value is None)):
                what = "is not a number" if kinds != (str,) else "is not a text"
                raise CorruptCheckpointError(f"statistics.{name}", what, found=repr(value)[:80])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name in _KINDS:
            setattr(self, name, state[name])


# The digest of a batch: proof of which data was used, in which order.


def batch_digest(data: Any) -> str:
    """Return the xxh3-128 digest of the bytes of all tensors in a batch, in a fixed order.

    Example:
        >>> batch_digest([torch.ones(2)]) == batch_digest({"x": torch.ones(2)})
        True
    """
    digest = xxhash.xxh3_128()
    for tensor in _tensors_in(data):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


class DataDigest:
    """Chains the digests of all micro-batches into the statistics, in the order of the stream."""

    def __init__(self, statistics: Statistics, division: DataParallelLayout) -> None:
        self._statistics = statistics
        self._division = division
        self._pending: list[str] = []

    def add(self, data: Any) -> None:
        """Count a micro-batch of this rank."""
        digest = batch_digest(data)
        if self._division.parts == 1:
            self._statistics.add_data([digest])
        else:
            self._pending.append(digest)

    def step_is_over(self) -> None:
        """Chain what all ranks used in a step, part by part."""
        if self._pending:
            for digests in self._division.gather("the data of a step", list(self._pending)):
                self._statistics.add_data(digests)
            self._pending.clear()


def _tensors_in(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for key in sorted(data):
            yield from _tensors_in(data[key])
    elif isinstance(data, list | tuple):
        for part in data:
            yield from _tensors_in(part)


@dataclass
class RunState:
    """Where a run is, and what was asked of it; a checkpoint holds all that a resume needs of it.

    Attributes:
        config: The settings in use: `micro_batch_size="auto"` may make portions smaller.
        max_steps: The length of the run.
        progress: How far it is.
        statistics: What it reports about itself, and the best metric so far.
        stop_reason: Why it is to end after the current step, or None.
        save_requested: Whether to save when all that belongs to the step has happened.
        resume_report: How this process's part of the run began.
    """

    config: TrainerConfig
    max_steps: int
    progress: Progress = field(default_factory=Progress)
    statistics: Statistics = field(default_factory=Statistics)
    stop_reason: str | None = None
    save_requested: bool = False
    resume_report: ResumeReport = field(default_factory=lambda: ResumeReport(step=0))

    @property
    def is_finished(self) -> bool:
        """Whether no step is left to take."""
        return self.progress.step >= self.max_steps or self.stop_reason is not None

    def position(self) -> dict[str, Any]:
        """Return where the run is, for a line of statistics."""
        return {"step": self.progress.step, "epoch": round(self.progress.epoch, 6)}

    def to_save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the values that a resume needs, and the facts that it compares first."""
        progress, config = to_stored(self.progress), self.config
        values = {
            "progress": progress,
            "stop_reason": self.stop_reason,
            "micro_batch_size": config.per_forward,
        }
        facts = {"progress": progress, "config": config.to_dict(), "max_steps": self.max_steps}
        return values, facts

    def agree_on_requests(self, group: Group) -> None:
        """Make a stop or a save that a callback on one rank requested apply to all ranks."""
        has_request = self.stop_reason is not None or self.save_requested
        if group.world_size == 1 or not group.any(has_request):
            return
        own = [self.stop_reason, self.save_requested]
        requests: Any = group.gather("what callbacks asked for", own)
        self.stop_reason = next((reason for reason, _ in requests if reason is not None), None)
        self.save_requested = any(requested for _, requested in requests)

    def note_found(self, line: str, difference: Difference | None) -> None:
        """Add to the report of the start what showed since."""
        self.resume_report = self.resume_report.with_found(line, difference)

    def use_micro_batch(self, size: int, source: BatchSource | None) -> None:
        """Divide batches into micro-batches of this size from now on."""
        if size != self.config.per_forward and isinstance(source, MapSource):
            self.config = self.config.replace(micro_batch_size=size)
            source.split_into(size)

    def already_over(self) -> str:
        """Return the line to show where the run was already finished."""
        where = f"at step {self.progress.step} of {self.max_steps} already"
        if self.progress.step >= self.max_steps:
            return f"finished {where}; nothing to do"
        return f"stopped {where} ({self.stop_reason}); nothing to do"
