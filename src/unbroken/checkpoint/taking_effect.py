"""Changes that were named take effect: what is meant is set anew over the stored state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.checkpoint.as_built import AsBuilt, named_objects
from unbroken.checkpoint.differences import Difference

NOT_LOADED = "not loaded: skip names it"


def take_effect(
    differences: Iterable[Difference], built: AsBuilt, objects: Mapping[str, Any]
) -> None:
    """Set hyperparameters, schedules and frozen parameters as this start has built them.

    Moments and counters stay; a schedule is the new one at the step where the run is, also over
    an optimizer that was not loaded. Under a schedule that was not loaded the rates begin anew.

    Args:
        differences: Those that were allowed; their paths say what changed.
        built: The objects before the resume.
        objects: The same objects, just restored.
    """
    found = [d for d in differences if d.verdict in ("changed", "equivalent")]
    changed = {d.path: d for d in found if d.effect != NOT_LOADED}
    skipped = {d.path for d in found if d.effect == NOT_LOADED}
    if "model.frozen" in changed and isinstance(objects.get("model"), nn.Module):
        built.set_frozen(objects["model"])
    if "model.eval" in changed and isinstance(objects.get("model"), nn.Module):
        built.set_modes(objects["model"])
    moved: dict[int, float] = {}
    for name, optimizer in _of_type(objects, Optimizer):
        options = options_of("optimizer", name, changed)
        built.set_options(optimizer, options)
        if "lr" in options:
            moved[id(optimizer)] = ratio(changed[options["lr"]])
            if not _scheduled(objects, optimizer):
                built.set_learning_rates(optimizer)
        elif _is_in(name, skipped):
            moved[id(optimizer)] = 1.0
    for name, scheduler in _of_type(objects, LRScheduler):
        optimizer = scheduler.optimizer
        if name in skipped:
            built.set_learning_rates(optimizer)
        elif options_of("scheduler", name, changed) or id(optimizer) in moved:
            built.reschedule(scheduler, scale=moved.get(id(optimizer), 1.0))


def options_of(kind: str, name: str, paths: Iterable[str]) -> dict[str, str]:
    """Return what changed of one object: its options, each with its path.

    Example:
        >>> options_of("optimizer", "critic", ["optimizer.lr", "optimizer.critic.betas"])
        {'betas': 'optimizer.critic.betas'}
    """
    prefix = f"{kind}." if name == kind else f"{kind}.{name}."
    own = {path.removeprefix(prefix): path for path in paths if path.startswith(prefix)}
    return {option.partition(".")[0]: path for option, path in own.items()}


def ratio(difference: Difference) -> float:
    """Return a new number over the old one; 1 where that means nothing."""
    numbers = isinstance(difference.now, int | float), isinstance(difference.stored, int | float)
    return difference.now / difference.stored if all(numbers) and difference.stored else 1.0


def _is_in(name: str, skipped: set[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for path in skipped)


def _scheduled(objects: Mapping[str, Any], optimizer: Optimizer) -> bool:
    schedulers = _of_type(objects, LRScheduler)
    return any(scheduler.optimizer is optimizer for _, scheduler in schedulers)


def _of_type(objects: Mapping[str, Any], kind: type[Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in named_objects(objects) if isinstance(value, kind)]


def untrained_names(differences: Iterable[Difference]) -> frozenset[str]:
    """Return the parameters that were frozen or unfrozen: they have no state to load."""
    found = [d for d in differences if d.path == "model.frozen"]
    return frozenset(name for d in found for name in _names(d.stored) ^ _names(d.now))


def _names(value: object) -> set[str]:
    return {one for one in value if isinstance(one, str)} if isinstance(value, list) else set()
