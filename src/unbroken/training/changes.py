"""Changed settings of a resumed run: what each means, and how a named change takes effect."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import xxhash
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from unbroken.checkpoint import Difference, Rule, compare, environment_facts, refuse_unnamed
from unbroken.errors import DifferenceError
from unbroken.training.config import TrainerConfig

_CADENCE: Rule = ("harmless", "something happens at other steps; the training is the same")
_NAMING: Rule = ("harmless", "where things are; the training is the same")
_LOADING: Rule = ("harmless", "how data are read; the order and the samples are the same")
_JUDGING: Rule = ("harmless", "when the run ends or which checkpoint is the best")
_LENGTH: Rule = ("harmless", "the run ends elsewhere; a falling schedule falls to its new end")
_ROUNDING: Rule = ("equivalent", "the same sums, rounded in another order")
_ELSEWHERE: Rule = ("equivalent", "another machine or version may round differently")
_UPDATES: Rule = ("changed", "other updates from here on; the optimizer's moments are kept")
_SCHEDULE: Rule = ("changed", "another learning rate from here on, at the same step")
_FORWARD: Rule = ("changed", "other gradients from here on")

_RULED: tuple[tuple[Rule, str], ...] = (
    (_CADENCE, "logging_steps logging_minutes log_data_digest eval_steps eval_minutes"),
    (_CADENCE, "eval_batch_size save_steps save_minutes save_at_start save_total_limit"),
    (_CADENCE, "keep_every_n_steps max_time"),
    (_NAMING, "output_dir branch data.cache"),
    (_LOADING, "dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory"),
    (_JUDGING, "metric_for_best_model greater_is_better load_best_model_at_end"),
    (_JUDGING, "early_stopping_patience early_stopping_threshold"),
    (_LENGTH, "max_steps num_train_epochs"),
    (_FORWARD, "micro_batch_size"),
    (_ROUNDING, "torch_compile gradient_checkpointing device full_determinism"),
    (_UPDATES, "weight_decay adam_beta1 adam_beta2 adam_epsilon sgd_momentum"),
    (_SCHEDULE, "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps"),
    (_FORWARD, "max_grad_norm bf16"),
)
RULES: Mapping[str, Rule] = {name: rule for rule, names in _RULED for name in names.split()}

_OF_THE_START = {"resume_from_checkpoint", "allow"}  # what to resume and what to let pass
_OPTIMIZER_SETTINGS = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "sgd_momentum"}
_SCHEDULE_SETTINGS = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"}
_STEERING = (
    "eval_steps",
    "eval_minutes",
    "eval_batch_size",
    "metric_for_best_model",
    "greater_is_better",
)
_FORWARD_SETTINGS = {"max_grad_norm", "bf16", "micro_batch_size"}
_TAKE_EFFECT = {*_OPTIMIZER_SETTINGS, *_SCHEDULE_SETTINGS, *_FORWARD_SETTINGS, *_STEERING}


@dataclass(frozen=True)
class Fresh:
    """The hyperparameters of an optimizer and a schedule as this start has made them.

    Taken before a resume, which puts the stored ones in their place.
    """

    groups: tuple[Mapping[str, Any], ...]
    learning_rates: tuple[float, ...]

    @classmethod
    def of(cls, optimizer: Optimizer) -> Fresh:
        """Take them."""
        left_out = ("params", "lr", "initial_lr")
        groups = tuple(
            {key: value for key, value in group.items() if key not in left_out}
            for group in optimizer.param_groups
        )
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        return cls(groups, tuple(map(float, rates)))


def examine(
    config: TrainerConfig, more: Mapping[str, Any], facts: Mapping[str, Any]
) -> tuple[Difference, ...]:
    """Return how the settings and the machine of a checkpoint differ from those of this start.

    Args:
        config: The settings of this start; `allow` names the changes that are meant.
        more: Other settings that the training depends on, in groups.
        facts: The facts in the checkpoint's manifest.

    Raises:
        DifferenceError: If a training-relevant setting differs and is not named, or if it is
            named but cannot be changed in the middle of a run.
    """
    rules = dict(RULES)
    if config.lr_scheduler_type == "reduce_lr_on_plateau":
        rules.update(dict.fromkeys(_STEERING, _SCHEDULE))  # evaluations steer the learning rate
    differences = (
        *compare(_comparable(_mapping(facts, "config")), _comparable(config.to_dict()), rules),
        *compare(_flat(_mapping(facts, "settings")), _flat(more), RULES),
        *_elsewhere(_mapping(facts, "environment")),
    )
    where = f"checkpoint of step {_mapping(facts, 'progress').get('step')}"
    _refuse_impossible(where, differences)
    refuse_unnamed(where, differences, allowed=config.allow)
    return differences


def with_structure(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the structure of the model: its modules and what they print.

    A dropout rate or an activation that was changed in the code shows there; what a module does
    not print does not.

    Args:
        model: The model as it is at the start.
        settings: Settings in groups.
    """
    printed = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # an address is not the same twice
    structure = {"structure": xxhash.xxh3_128(printed.encode()).hexdigest()}
    return {**settings, "model": {**structure, **settings.get("model", {})}}


def _refuse_impossible(where: str, differences: tuple[Difference, ...]) -> None:
    own = {field.name for field in fields(TrainerConfig)}
    for difference in differences:
        path = difference.path
        if difference.verdict == "changed" and path in own and path not in _TAKE_EFFECT:
            raise DifferenceError(
                where,
                f"{path}: cannot be changed in the middle of a run",
                expected=difference.stored,
                found=difference.now,
                hint="keep the stored value, or begin a new run in another output_dir",
            )


def _elsewhere(stored: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return what is not the same about the machine and the software."""
    now = environment_facts()
    rules = dict.fromkeys(now, _ELSEWHERE)
    found = compare(stored, now, rules)
    return tuple(replace(difference, path=f"environment.{difference.path}") for difference in found)


def _mapping(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = facts.get(name)
    return value if isinstance(value, Mapping) else {}


def _flat(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"model": {"n_layer": 2}} as {"model.n_layer": 2}; as JSON has it."""
    flat = {
        f"{group}.{name}": value
        for group, settings in groups.items()
        for name, value in (settings.items() if isinstance(settings, Mapping) else ())
    }
    return dict(json.loads(json.dumps(flat, default=str)))


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Spell equal settings equally."""
    values = {key: value for key, value in settings.items() if key not in _OF_THE_START}
    if values.get("micro_batch_size") is None:
        values["micro_batch_size"] = values.get("batch_size")
    if values.get("data_seed") == values.get("seed"):
        values["data_seed"] = None
    return values


def take_effect(
    differences: tuple[Difference, ...], fresh: Fresh, optimizer: Optimizer, scheduler: LRScheduler
) -> None:
    """Give the optimizer and the schedule the new values of the named changes.

    The moments stay; the schedule is the new one at the step where the run is.

    Args:
        differences: What `examine` returned.
        fresh: The hyperparameters before the resume.
        optimizer: Just restored.
        scheduler: Just restored.
    """
    changed = {difference.path for difference in differences}
    if changed & _OPTIMIZER_SETTINGS:
        for group, values in zip(optimizer.param_groups, fresh.groups, strict=True):
            group.update(values)
    if isinstance(scheduler, LambdaLR):
        if changed & {*_SCHEDULE_SETTINGS, "max_steps", "num_train_epochs"}:
            _reschedule(optimizer, scheduler, fresh.learning_rates)
    elif isinstance(scheduler, ReduceLROnPlateau) and "learning_rate" in changed:
        for group, rate in zip(optimizer.param_groups, fresh.learning_rates, strict=True):
            group["lr"] = rate  # it falls from there by the metric


def _reschedule(optimizer: Optimizer, scheduler: LambdaLR, bases: tuple[float, ...]) -> None:
    """Set the learning rates that the schedule of this start has at the step of the run."""
    scheduler.base_lrs = [*bases]
    for group, base, factor in zip(
        optimizer.param_groups, bases, scheduler.lr_lambdas, strict=True
    ):
        group["initial_lr"], group["lr"] = base, base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # noqa: SLF001
