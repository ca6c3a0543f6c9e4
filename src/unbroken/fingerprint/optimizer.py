"""What an optimizer and a schedule are as they were built, before training moved them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.fingerprint.introspection import attributes_of
from unbroken.fingerprint.model import ON_OPTIMIZERS, hooks_on
from unbroken.fingerprint.source_code import is_user_code, qualified_name, source_digest
from unbroken.fingerprint.values import (
    Plain,
    callable_facts,
    facts_of_items,
    plain_attributes,
    plain_items,
)

_MOVED = {"params", "param_names", "lr", "initial_lr"}
_MOVING = {"_last_lr", "_schedulers", "lr_lambdas"}
_STATE = {"defaults", "param_groups", "state"}
_NO_SETTINGS = {"base_lrs", "last_epoch", "verbose"}


def optimizer_facts(optimizer: Optimizer) -> dict[str, Plain]:
    """Return the class of an optimizer and its hyperparameters.

    A hyperparameter that is the same in all groups stands alone, else as a list by group. The
    learning rate is the one that schedules start from.

    Example:
        >>> import torch
        >>> weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
        >>> groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias]}]
        >>> facts = optimizer_facts(torch.optim.SGD(groups, lr=0.5))
        >>> facts["lr"], facts["weight_decay"]
        (0.5, [0.1, 0])
    """
    groups = [_options(group) for group in optimizer.param_groups]
    names = sorted({name for group in groups for name in group})
    options = {name: _merged([group.get(name) for group in groups]) for name in names}
    facts = {"class": qualified_name(type(optimizer)), **_own_facts(optimizer), **options}
    return {**facts, **facts_of_items(hooks_on(optimizer, ON_OPTIMIZERS))}


def _own_facts(optimizer: Optimizer) -> dict[str, Plain]:
    """Return the code and the settings of an optimizer of the user's own class."""
    if not is_user_code(type(optimizer)):
        return {}
    public = {n: v for n, v in attributes_of(optimizer).items() if not n.startswith("_")}
    settings = {n: v for n, v in public.items() if n not in _STATE}
    return {"source": source_digest(type(optimizer)), **facts_of_items(settings)}


def _options(group: dict[str, Any]) -> dict[str, Plain]:
    own = {name: value for name, value in group.items() if name not in _MOVED}
    return plain_items({**own, "lr": group.get("initial_lr", group["lr"])})


def _merged(values: list[Plain]) -> Plain:
    return values[0] if all(value == values[0] for value in values) else values


def scheduler_facts(scheduler: LRScheduler) -> dict[str, Plain]:
    """Return the class of a schedule, its settings, and the code of its functions.

    Learning rates are the optimizer's facts, and where the schedule stands is state: neither
    counts here.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler_facts(torch.optim.lr_scheduler.StepLR(optimizer, step_size=30))["step_size"]
        30
    """
    facts: dict[str, Plain] = {"class": qualified_name(scheduler)}
    if is_user_code(type(scheduler)):
        facts["source"] = source_digest(scheduler)
    settings = plain_attributes(scheduler).items()
    facts |= {name: value for name, value in settings if name not in _NO_SETTINGS}
    facts |= facts_of_items(_more_settings(scheduler))
    for index, function in enumerate(getattr(scheduler, "lr_lambdas", ())):
        facts[f"lr_lambdas.{index}"] = callable_facts(function)
    for index, inner in enumerate(getattr(scheduler, "_schedulers", ())):
        facts[f"schedulers.{index}"] = scheduler_facts(inner)
    return facts


def _more_settings(scheduler: LRScheduler) -> dict[str, Any]:
    """Return milestones and functions of a schedule, which are no plain public values."""
    own = {n: v for n, v in attributes_of(scheduler).items() if n not in _MOVING}
    found: dict[str, Any] = {
        n: v for n, v in own.items() if n.startswith("_") and isinstance(v, list | str)
    }
    found |= {n: v for n, v in own.items() if isinstance(v, Counter)}
    return found | {n: v for n, v in own.items() if callable(v) and n not in ("step", "optimizer")}
