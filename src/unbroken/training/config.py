"""TrainerConfig: every setting of a run, checked when it is made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from unbroken.changes.rules import (
    CADENCE,
    EVALUATING,
    FORWARD,
    JUDGING,
    KEEPING,
    LOADING,
    LOGGING,
    METRIC,
    NAMING,
    OPTIMIZER,
    ORDER,
    RANDOM,
    ROUNDING,
    RUN_LENGTH,
    SCHEDULE,
    SIZE,
    SPLIT,
    STOPPING,
    STORING,
    UPDATES,
    VERIFYING,
)
from unbroken.checkpoint import ExactResume, ReadFrom, Rule, SaveMode
from unbroken.config_file import nearest, read_mapping, write_mapping
from unbroken.config_schema import (
    DESCRIBED,
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveInt,
    Share,
    check_fields,
)
from unbroken.errors import ConfigError
from unbroken.store import check_branch_name

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
]
Optim = Literal["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"]


class LeftOpen(int):
    """A number that nobody has set: where the data say another one, theirs counts.

    Example:
        >>> isinstance(TrainerConfig().batch_size, LeftOpen), TrainerConfig().batch_size
        (True, 8)
    """


T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """What a setting means for a run that is resumed with another value of it.

    Attributes:
        rule: What follows from another value; `START`: nothing, it is not compared.
        options: The options of the optimizer that it makes.
        in_data: What it makes in the state of the data.
        steers: Whether it decides what evaluations say, and so a learning rate that follows them.
        ends: Whether it decides when the run ends.
    """

    rule: Rule | None
    options: tuple[str, ...] = ()
    in_data: tuple[str, ...] = ()
    steers: bool = False
    ends: bool = False


START: Rule | None = None
"""In place of a rule: the setting says how to start, not what to train, and is not compared."""


def setting(default: T, rule: Rule | None, **meaning: Any) -> T:
    """Return a field of `TrainerConfig` with its default and its meaning for a resume.

    Args:
        default: Its default.
        rule: What another value means when a run is resumed, from `changes.rules`; or `START`.
        meaning: Further fields of `Setting`.
    """
    made: T = field(default=default, metadata={"setting": Setting(rule, **meaning)})
    return made


def settings() -> dict[str, Setting]:
    """Return the meaning of each field of `TrainerConfig`.

    Example:
        >>> settings()["learning_rate"].rule[1]
        'another learning rate from here on, at the same step'
    """
    return {one.name: one.metadata["setting"] for one in fields(TrainerConfig)}


C = TypeVar("C", bound=type)


def _names_what_is_unknown(kind: C) -> C:
    """Let a class of settings name the nearest field for a keyword that it does not have."""
    make: Callable[..., None] = vars(kind)["__init__"]

    @functools.wraps(make)
    def init(self: Any, *arguments: Any, **values: Any) -> None:
        _refuse_unknown(values, where=type(self).__name__)
        make(self, *arguments, **values)

    kind.__init__ = init  # type: ignore[misc]
    return kind


@_names_what_is_unknown
@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """All settings of a run, with the names of `transformers.TrainingArguments`.

    Raises:
        ConfigError: If a value has the wrong type or is out of range, or if two values do not
            fit together; the message names the field and shows the value.

    Example:
        >>> config = TrainerConfig(output_dir="runs/gpt2", batch_size=32, micro_batch_size=8)
        >>> config.gradient_accumulation_steps
        4
    """

    __pydantic_config__: ClassVar = DESCRIBED

    output_dir: str = setting("runs/default", NAMING)
    """The run directory: checkpoints, history and metrics."""
    resume_from_checkpoint: bool | int | str = setting("auto", START)
    """"auto", "must", "never", "best", a step, or the path of a checkpoint."""
    branch: str | None = setting(None, NAMING)
    """Train in a branch of this name, a run of its own in `output_dir`/branches, that begins in
    the checkpoint which `resume_from_checkpoint` names; the same command goes on with it."""
    allow: tuple[str, ...] = setting((), START)
    """Changes on resume that are meant: settings, or groups ("data", "model", "optimizer"); any
    other change of the training is refused."""
    skip: tuple[str, ...] = setting((), START)
    """What is not loaded when a run begins from a checkpoint: patterns of parameters
    ("lm_head.*") or objects ("optimizer"). They keep the values that they have here."""
    exact_resume: ExactResume = setting("prefer", START)
    """"require": a resume that is only equivalent (other machine, other rounding) is refused."""

    read_from: ReadFrom = setting("all", START)
    """Who reads the checkpoint on several ranks: "all" of them; or "rank0", which sends it to the
    others, for a run directory that they cannot see."""

    ddp_timeout: Positive = setting(600.0, START)
    """Seconds that ranks wait for each other before they end with an error that names who is
    missing."""

    batch_size: PositiveInt = setting(
        LeftOpen(8), SIZE, in_data=("global_batch_size", "epoch_size")
    )
    """Samples in one optimizer step, over all ranks and micro-batches (the global batch). Left
    open, and without a `micro_batch_size`, it is that of the `DataLoader` that holds the data."""
    micro_batch_size: PositiveInt | Literal["auto"] | None = setting(None, SPLIT)
    """Samples in one forward pass of one process; None: the whole global batch; "auto": the whole
    batch, and half of it each time that a step does not fit into the device's memory."""
    lanes: PositiveInt | None = setting(None, ROUNDING)
    """Sum gradients in so many lanes, a power of two: the same bits on 1, 2, 4, ... `lanes` ranks.
    None: a lane for each rank, and the same bits on as many ranks."""
    max_steps: int = setting(-1, RUN_LENGTH, ends=True)
    """Optimizer steps of the whole run; -1: `num_train_epochs` decides."""
    num_train_epochs: Positive = setting(3.0, RUN_LENGTH, ends=True)
    """Passes over the data, when `max_steps` is -1; the last step is completed."""
    shuffle: bool = setting(True, ORDER, in_data=("shuffle",))
    """Whether each epoch has an order of its own."""
    dataloader_drop_last: bool = setting(False, ORDER, in_data=("epoch_size",))
    """Leave out the samples at the end of an epoch that fill no batch, instead of going on
    with the next epoch inside the batch."""
    samples_per_epoch: PositiveInt | None = setting(None, ORDER, in_data=("epoch_size",))
    """Use only so many samples of each epoch's order; None: all."""
    dataloader_num_workers: NotNegativeInt = setting(0, LOADING)
    """Worker processes that load data; the bits do not depend on it."""
    dataloader_prefetch_factor: PositiveInt | None = setting(None, LOADING)
    """Batches that each worker loads ahead; None: PyTorch's default."""
    dataloader_pin_memory: bool = setting(False, LOADING)
    """Whether batches are put into pinned memory, for faster copies to a GPU."""

    optim: Optim = setting("adamw_torch_fused", OPTIMIZER, options=("fused", "foreach"))
    """The optimizer, unless one is given to the Trainer."""
    learning_rate: NotNegative = setting(5e-5, SCHEDULE)
    """The highest learning rate, reached after warm-up."""
    weight_decay: NotNegative = setting(0.0, UPDATES, options=("weight_decay",))
    """Decoupled weight decay; one-dimensional parameters (biases, norms) are left out."""
    adam_beta1: Share = setting(0.9, UPDATES, options=("betas",))
    """Decay of Adam's mean of gradients."""
    adam_beta2: Share = setting(0.999, UPDATES, options=("betas",))
    """Decay of Adam's mean of squared gradients."""
    adam_epsilon: Positive = setting(1e-8, UPDATES, options=("eps",))
    """Added to the divisor of Adam's update."""
    sgd_momentum: NotNegative = setting(0.0, UPDATES, options=("momentum",))
    """Momentum of `optim="sgd"`."""
    max_grad_norm: NotNegative = setting(1.0, FORWARD)
    """Gradients are scaled down to this norm; 0: no clipping."""
    lr_scheduler_type: Schedule = setting("linear", SCHEDULE)
    """How the learning rate goes on after warm-up."""
    lr_scheduler_kwargs: dict[str, float] | None = setting(None, SCHEDULE)
    """Settings of the schedule: `min_lr_rate`, `num_cycles`, `power`, `lr_end`, ..."""
    warmup_steps: NotNegative = setting(0, SCHEDULE)
    """Steps in which the learning rate rises from 0; below 1: a share of all steps."""

    bf16: bool = setting(False, FORWARD)
    """Autocast to bfloat16."""
    fp16: bool = setting(False, FORWARD)
    """Autocast to float16, with gradient scaling."""
    torch_compile: bool = setting(False, ROUNDING)
    """Run the model through `torch.compile`."""
    gradient_checkpointing: bool = setting(False, ROUNDING)
    """Save memory by computing activations again; the model must support it."""
    device: str = setting("auto", ROUNDING)
    """"auto": the first GPU if there is one, else the CPU; or a `torch.device` string."""
    full_determinism: bool = setting(True, ROUNDING)
    """Only deterministic kernels, so that a run repeats bit for bit on a GPU too."""
    seed: NotNegativeInt = setting(42, RANDOM, in_data=("seed",))
    """All randomness of the run is derived from it."""
    data_seed: NotNegativeInt | None = setting(None, ORDER, in_data=("seed",))
    """The seed of the order of the data; None: `seed`."""

    logging_steps: PositiveInt | None = setting(10, CADENCE)
    """Write statistics every so many steps; None: not by steps."""
    logging_minutes: Positive | None = setting(None, CADENCE)
    """Write statistics every so many minutes; None: not by time."""
    log_data_digest: bool = setting(False, LOGGING)
    """Log a running digest of all training batches used: proof of the order of the data."""
    eval_steps: PositiveInt | None = setting(None, CADENCE, steers=True)
    """Evaluate every so many steps; None: not by steps."""
    eval_minutes: Positive | None = setting(None, CADENCE, steers=True)
    """Evaluate every so many minutes; None: not by time."""
    eval_batch_size: PositiveInt | None = setting(None, EVALUATING, steers=True)
    """Samples in one forward pass of the evaluation; None: the micro-batch size."""
    save_steps: PositiveInt | Literal["auto"] | None = setting(500, CADENCE)
    """Save a checkpoint every so many steps; "auto": as often as loses least time, by what saves
    cost and how often the run fails; None: not by steps."""
    save_minutes: Positive | None = setting(None, CADENCE)
    """Save a checkpoint every so many minutes; None: not by time."""
    max_lost_minutes: Positive | None = setting(None, CADENCE)
    """Save so often, besides, that a failure takes no more than so many minutes of training."""
    mtbf_hours: Positive | None = setting(None, CADENCE)
    """Mean time between failures, for `save_steps="auto"`; None: as the history of the run says."""
    save_mode: SaveMode = setting("blocking", STORING)
    """How a save gets hold of the state: "blocking" writes it while training waits, "async" copies
    it and writes while training goes on, "overlap" copies meanwhile, too; see `Checkpointer`."""
    save_compressed: bool = setting(False, STORING)
    """Keep tensors compressed, without loss, for storage that is slow or metered; needs
    `unbroken[zstd]`. Other programs cannot read such files: see `unbroken export`."""
    save_at_start: bool = setting(True, CADENCE)
    """Save `checkpoint-0` before the first step, so that a run killed before its first
    regular checkpoint starts again from the same weights."""
    save_total_limit: PositiveInt | None = setting(None, KEEPING)
    """Keep only so many of the newest intact checkpoints; None: all."""
    keep_every_n_steps: PositiveInt | None = setting(None, KEEPING)
    """Keep, besides, every checkpoint whose step is a multiple of this."""
    verify_steps: PositiveInt | None = setting(None, VERIFYING)
    """Run the forward and backward of every so manieth step twice and compare them, and weights and
    moments while they rest: a flipped bit is found and named; None: no step, at no cost."""
    max_time: float | str | None = setting(None, STOPPING)
    """Save and stop after so many seconds, or "HH:MM:SS", in this process."""
    confirm_stops: bool = setting(False, STOPPING)
    """Take one step more after the save for a stop, and throw it away: the next start repeats it
    and says whether it is the same. Without it a stop leaves no step to compare."""

    metric_for_best_model: str = setting("eval_loss", METRIC, steers=True, ends=True)
    """The evaluation metric that decides which checkpoint is the best."""
    greater_is_better: bool = setting(False, METRIC, steers=True, ends=True)
    """Whether the best value of that metric is the highest; else it is the lowest."""
    load_best_model_at_end: bool = setting(False, JUDGING)
    """Put the weights of the best checkpoint into the model when training ends."""
    early_stopping_patience: PositiveInt | None = setting(None, JUDGING, ends=True)
    """Stop after so many evaluations in a row without a better metric; None: never."""
    early_stopping_threshold: NotNegative = setting(0.0, JUDGING, ends=True)
    """How much better the metric must be to count."""

    def __post_init__(self) -> None:
        for name in ("allow", "skip"):
            if isinstance(getattr(self, name), list):  # as JSON and YAML have it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_fields(self)
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        if self.branch is not None:
            check_branch_name(self.branch)
        if not self.output_dir:
            raise ConfigError("output_dir", expected="a folder", found=repr(self.output_dir))
        if self.max_steps != -1 and self.max_steps < 1:
            raise ConfigError("max_steps", expected="-1 or a positive number", found=self.max_steps)

    def _check_combinations(self) -> None:
        if self.batch_size % self.per_forward != 0:
            raise ConfigError(
                "batch_size",
                "must be a multiple of micro_batch_size",
                expected=f"a multiple of {self.per_forward}",
                found=self.batch_size,
            )
        lanes = 1 if self.lanes is None else self.lanes
        if lanes & (lanes - 1) or self.batch_size % (lanes * self.per_forward):
            raise ConfigError(
                "lanes",
                expected="a power of two; batch_size a multiple of lanes * micro_batch_size",
                found=f"lanes {lanes}, batch_size {self.batch_size}, "
                f"micro_batch_size {self.per_forward}",
            )
        if self.fp16 and self.bf16:
            raise ConfigError("fp16", "cannot be combined with bf16: choose one")
        if self.early_stopping_patience is not None and not self.evaluates:
            raise ConfigError("early_stopping_patience", "needs eval_steps or eval_minutes")
        if self.load_best_model_at_end and not self.evaluates:
            raise ConfigError("load_best_model_at_end", "needs eval_steps or eval_minutes")
        if self.mtbf_hours is not None and self.save_steps != "auto":
            found = f"save_steps={self.save_steps}"
            raise ConfigError("mtbf_hours", 'needs save_steps="auto"', found=found)
        _refuse_unknown((name for name in self.allow if "." not in name), where="allow")
        self.max_seconds()

    @property
    def per_forward(self) -> int:
        """Samples in one forward pass of one process."""
        size = self.micro_batch_size
        if isinstance(size, int):
            return size
        return self.batch_size // (1 if self.lanes is None or size == "auto" else self.lanes)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward passes of one process in one optimizer step."""
        return self.batch_size // self.per_forward

    @property
    def evaluates(self) -> bool:
        """Whether evaluation happens during training."""
        return self.eval_steps is not None or self.eval_minutes is not None

    @property
    def chooses_by_evaluations(self) -> bool:
        """Whether evaluations say when the run ends, or which weights it ends with."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def max_seconds(self) -> float | None:
        """Return `max_time` in seconds.

        Example:
            >>> TrainerConfig(max_time="01:30:00").max_seconds()
            5400.0
        """
        if self.max_time is None:
            return None
        if isinstance(self.max_time, int | float):
            if not self.max_time > 0:
                raise ConfigError("max_time", "must be positive", found=self.max_time)
            return float(self.max_time)
        parts = self.max_time.split(":")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            raise ConfigError("max_time", expected='seconds or "HH:MM:SS"', found=self.max_time)
        hours, minutes, seconds = map(int, parts)
        return float(hours * 3600 + minutes * 60 + seconds)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked again."""
        _refuse_unknown(changes, where="TrainerConfig")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, for YAML or JSON."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        plain = {"batch_size": int(self.batch_size)}
        return {**values, **plain, "allow": list(self.allow), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "TrainerConfig") -> Self:
        """Return the configuration with these fields; all others have their defaults.

        Raises:
            ConfigError: If a field does not exist; the message names the nearest that does.

        Example:
            >>> TrainerConfig.from_dict({"learning_rte": 1e-3})
            Traceback (most recent call last):
                ...
            unbroken.errors.ConfigError: TrainerConfig: unknown field learning_rte
            did you mean learning_rate?
        """
        _refuse_unknown(values, where)
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `.yaml`, `.yml` or `.json` file.

        Raises:
            ConfigError: If the file is missing, unreadable, or holds an unknown or wrong field.
        """
        return cls.from_dict(read_mapping(Path(path)), where=str(path))

    def to_file(self, path: str | Path) -> None:
        """Write all fields to a `.yaml`, `.yml` or `.json` file."""
        write_mapping(Path(path), self.to_dict())


_GROUPS = (
    "data",
    "model",
    "optimizer",
    "scheduler",
    "schedule",
    "loss",
    "code",
    "trainer",
    "callbacks",
    "environment",
    "state",
)


def _refuse_unknown(values: Iterable[str], where: str) -> None:
    known = [one.name for one in fields(TrainerConfig)]
    groups = _GROUPS if where == "allow" else ()
    for name in values:
        if name not in (*known, *groups):
            raise ConfigError(where, f"unknown field {name}", hint=nearest(name, known))
