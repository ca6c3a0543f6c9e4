"""Changed settings of a resumed run: what each means, and how a named change takes effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from unbroken.changes.rules import METRIC, NOT_USED, SCHEDULE, UPDATES, with_schedule_length
from unbroken.checkpoint import Difference, Rule, by_severity, compare, unchanged
from unbroken.data import BatchSource
from unbroken.distributed import Group
from unbroken.errors import ConfigError
from unbroken.training.config import START, TrainerConfig, settings
from unbroken.training.optim import factor_of
from unbroken.training.run_state import Progress, RunState, count_steps

_SETTINGS = settings()
_OF_THE_START = {name for name, one in _SETTINGS.items() if one.rule is START}
RULES: Mapping[str, Rule] = {n: one.rule for n, one in _SETTINGS.items() if one.rule is not None}
"""What a difference in each setting means, if nothing else of the run says otherwise.

Derived: the rule of a setting stands at its field in `TrainerConfig`.
"""

OPTIMIZER_SETTINGS = {name for name, rule in RULES.items() if rule == UPDATES}
SCHEDULE_SETTINGS = {name for name, rule in RULES.items() if rule == SCHEDULE}
METRIC_SETTINGS = {name for name, rule in RULES.items() if rule == METRIC}
ENDING_SETTINGS = {name for name, one in _SETTINGS.items() if one.ends}
OPTIMIZER_OPTIONS = {name: one.options for name, one in _SETTINGS.items() if one.options}
"""The options of an optimizer that a setting makes."""

_STEERING_SETTINGS = [name for name, one in _SETTINGS.items() if one.steers]

IN_DATA: Mapping[str, tuple[str, ...]] = {
    **{name: one.in_data for name, one in _SETTINGS.items() if one.in_data},
    "data": ("n", "epoch_size", "fingerprint", "length"),
    "data.length": ("n", "epoch_size", "length"),
    "data.fingerprint": ("fingerprint",),
}
"""What a named change may change in the state of the data."""

_ADAMW = {"adamw_torch", "adamw_torch_fused"}
_KERNEL = "another kernel rounds in another order; the optimizer's state is kept"
_CHOICE = "other evaluations from here on choose the best checkpoint, or when the run ends"


def _samples_of_epoch(n: int, config: Mapping[str, Any]) -> int | None:
    """Return how many samples are in each epoch; None where the settings are not there."""
    size, batch = config.get("samples_per_epoch") or n, config.get("batch_size")
    if not isinstance(batch, int) or not isinstance(size, int) or batch < 1:
        return None
    return size - size % batch if config.get("dataloader_drop_last") else size


class Examination:
    """Adds to what differs in objects and data what differs in the configuration of a Trainer."""

    def __init__(
        self,
        state: RunState,
        model: nn.Module,
        source: BatchSource | None,
        group: Group,
        *,
        config_made_optimizer: bool,
        config_made_schedule: bool,
        evaluations_steer: bool,
    ) -> None:
        self._state = state
        self._model = model
        self._source = source
        self._group = group
        self._config_made_optimizer = config_made_optimizer
        self._config_made_schedule = config_made_schedule
        self._evaluations_steer = evaluations_steer

    def __call__(
        self, facts: Mapping[str, Any], found: tuple[Difference, ...]
    ) -> tuple[Difference, ...]:
        """Return all differences from the checkpoint with these facts, and the settings kept."""
        config, stored = self._state.config, by_todays_names(_mapping(facts, "config"))
        refuse_unfinished_step(config, self._group, facts)
        now = config.to_dict()
        if config.micro_batch_size == "auto":
            now["micro_batch_size"] = stored.get("micro_batch_size")  # goes on with that size
        compared = compare(_comparable(stored), _comparable(now), self._rules())
        differences = by_severity(self._by_both(one, stored, now) for one in compared)
        chooses = config.evaluates and (config.chooses_by_evaluations or _may_end_the_run(facts))
        others = tuple(
            self._judged(one, stored, chooses=chooses)
            for one in found
            if not self._is_idle(one, chooses=chooses)
        )
        same = unchanged(_comparable(stored), _comparable(now))
        if stored and self._config_made_schedule:
            differences = self._with_length(differences, others, facts)
        return (*differences, *others, *same)

    def _by_both(
        self, difference: Difference, stored: Mapping[str, Any], now: Mapping[str, Any]
    ) -> Difference:
        """Judge by both values what a setting alone cannot tell."""
        if difference.path == "optim" and {str(difference.stored), str(difference.now)} <= _ADAMW:
            return replace(difference, verdict="equivalent", effect=_KERNEL)
        order = getattr(self._source, "order", None)
        if difference.path in ("dataloader_drop_last", "samples_per_epoch") and order is not None:
            sizes = {_samples_of_epoch(order.n, config) for config in (stored, now)}
            if len(sizes) == 1:
                return replace(difference, verdict="harmless", effect="the epochs are the same")
        return difference

    def _rules(self) -> dict[str, Rule]:
        rules = rules_for(self._model)
        if self._evaluations_steer:
            rules.update(dict.fromkeys(_STEERING_SETTINGS, SCHEDULE))
        if not self._config_made_optimizer:
            rules.update(dict.fromkeys({*OPTIMIZER_SETTINGS, "optim"}, NOT_USED))
        if not self._config_made_schedule:
            rules.update(dict.fromkeys(SCHEDULE_SETTINGS - {"learning_rate"}, NOT_USED))
        if not self._config_made_optimizer and self._state.config.lr_scheduler_type != "polynomial":
            rules["learning_rate"] = NOT_USED
        return rules

    def _is_idle(self, difference: Difference, *, chooses: bool) -> bool:
        """Return whether evaluation data are uncovered that nothing in the run depends on."""
        evaluates = difference.path.startswith("eval_data.")
        counts = self._evaluations_steer or chooses
        return evaluates and difference.verdict == "not covered" and not counts

    def _judged(
        self, difference: Difference, stored: Mapping[str, Any], *, chooses: bool
    ) -> Difference:
        """Evaluation data matter where evaluations steer the learning rate, or choose."""
        if difference.path.startswith("eval_data.") and not self._evaluations_steer:
            if not chooses:
                return replace(difference, verdict="harmless", effect="other evaluations")
            if difference.verdict == "changed":
                return replace(difference, verdict="equivalent", effect=_CHOICE)
        return self._judged_by_lanes(difference, stored)

    def _judged_by_lanes(self, difference: Difference, stored: Mapping[str, Any]) -> Difference:
        """Lanes make another number of ranks harmless."""
        lanes = self._state.config.lanes
        if difference.path != "environment.world_size" or lanes is None:
            return difference
        if stored.get("lanes") != lanes:
            return difference
        effect = "the same lanes on other ranks: the same bits"
        return replace(difference, verdict="harmless", effect=effect)

    def _with_length(
        self,
        differences: tuple[Difference, ...],
        others: tuple[Difference, ...],
        facts: Mapping[str, Any],
    ) -> tuple[Difference, ...]:
        """Tell what a run of another length does to a schedule that falls to its end."""
        config = self._state.config
        progress = Progress.of(facts.get("progress"))
        length = facts.get("max_steps")
        if not isinstance(length, int):
            return differences
        return with_schedule_length(
            differences,
            others,
            lengths=(length, count_steps(config, self._source, progress)),
            step=progress.step,
            learning_rate=config.learning_rate,
            factor_of=partial(factor_of, config),
            of_schedule=SCHEDULE_SETTINGS,
        )


def refuse_unfinished_step(config: TrainerConfig, group: Group, facts: Mapping[str, Any]) -> None:
    """Raise where lanes or ranks would have to finish a step that one process began alone.

    Raises:
        ConfigError: If the checkpoint with these facts lies inside an accumulation window.
    """
    shared = group.world_size > 1 or config.lanes is not None
    if shared and Progress.of(facts.get("progress")).pending:
        raise ConfigError(
            "lanes" if config.lanes is not None else "world_size",
            "the checkpoint lies inside a step, which one rank without lanes began",
            hint="finish the step as it was begun, or resume from a checkpoint between two steps",
        )


def rules_for(model: nn.Module) -> dict[str, Rule]:
    """Return what a difference in each setting means for this model."""
    rules = dict(RULES)
    statistics = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 (the base of all of them)
    if any(isinstance(module, statistics) and module.training for module in model.modules()):
        rules["micro_batch_size"] = ("changed", "batch statistics are those of other portions")
    elif _draws(model):
        split = "the same samples in each step; dropout draws other masks for other portions"
        rules["micro_batch_size"] = ("equivalent", split)
    return rules


def _draws(model: nn.Module) -> bool:
    dropout = nn.modules.dropout._DropoutNd  # noqa: SLF001 (the base of all of them)
    return any(isinstance(module, dropout) and module.p > 0 for module in model.modules())


def _may_end_the_run(facts: Mapping[str, Any]) -> bool:
    """Return whether a callback of the checkpoint could end the run, by its evaluations too."""
    callbacks = _mapping(_mapping(facts, "fingerprint"), "callbacks").values()
    return any(isinstance(one, Mapping) and bool(one.get("stops")) for one in callbacks)


def _mapping(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = facts.get(name)
    return value if isinstance(value, Mapping) else {}


FORMER_NAMES: dict[str, str] = {"load_from": "read_from", "snapshot": "save_mode"}
"""The settings that were stored under another name than they have today: {"former": "today"}."""

FORMER_VALUES: dict[str, dict[Any, Any]] = {"save_mode": {"stream": "blocking", "sync": "async"}}
"""By the names of today, the values that were stored in other words: {"former": "today"}."""


def by_todays_names(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a checkpoint by the names, and in the words, that they have today.

    Example:
        >>> by_todays_names({"learning_rate": 0.1, "snapshot": "sync"})
        {'learning_rate': 0.1, 'save_mode': 'async'}
    """
    renamed = {FORMER_NAMES.get(name, name): value for name, value in stored.items()}
    words = {name: FORMER_VALUES[name] for name in FORMER_VALUES.keys() & renamed.keys()}
    return renamed | {
        name: known.get(renamed[name], renamed[name])
        for name, known in words.items()
        if isinstance(renamed[name], str)
    }


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Spell equal settings equally."""
    values = {key: value for key, value in settings.items() if key not in _OF_THE_START}
    if values.get("micro_batch_size") in (None, "auto"):
        values["micro_batch_size"] = values.get("batch_size")
    if values.get("data_seed") == values.get("seed"):
        values["data_seed"] = None
    return values
