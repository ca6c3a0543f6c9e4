"""Changes that were named take effect: what is meant is set anew over the stored state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.checkpoint.as_built import AsBuilt, all_objects
from unbroken.checkpoint.differences import Difference


def take_effect(
    differences: Iterable[Difference], built: AsBuilt, objects: Mapping[str, Any]
) -> None:
    """Set hyperparameters, schedules and frozen parameters as this start has built them.

    Moments and counters stay; a schedule is the new one at the step where the run is.

    Args:
        differences: Those that were allowed; their paths say what changed.
        built: The objects before the resume.
        objects: The same objects, just restored.
    """
    changed = {d.path for d in differences if d.verdict in ("changed", "equivalent")}
    if "model.frozen" in changed and isinstance(objects.get("model"), nn.Module):
        built.set_frozen(objects["model"])
    if any(path.startswith("optimizer.") for path in changed - {"optimizer.lr"}):
        for optimizer in _of_type(objects, Optimizer):
            built.set_options(optimizer)
    if "optimizer.lr" in changed:
        for optimizer in _of_type(objects, Optimizer):
            built.set_learning_rates(optimizer)
    if "optimizer.lr" in changed or any(path.startswith("scheduler.") for path in changed):
        for scheduler in _of_type(objects, LRScheduler):
            built.reschedule(scheduler)


def _of_type(objects: Mapping[str, Any], kind: type[Any]) -> list[Any]:
    return [value for value in all_objects(objects) if isinstance(value, kind)]


def untrained_names(differences: Iterable[Difference]) -> frozenset[str]:
    """Return the parameters that were frozen or unfrozen: they have no state to load."""
    found = [d for d in differences if d.path == "model.frozen"]
    return frozenset(name for d in found for name in {*d.stored} ^ {*d.now})
