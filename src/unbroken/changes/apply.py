"""Optimizers, schedules and modules as this start has built them, for changes that are meant.

A resume puts the stored hyperparameters in the place of these. Where the caller has named a
change, they are put back, and what is state (moments, counters) stays.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from unbroken.capture import all_objects, named_objects, named_parameters
from unbroken.changes.differences import Difference
from unbroken.changes.rules import is_another_schedule

_NO_OPTIONS = ("params", "param_names", "lr", "initial_lr")
_OF_THE_METRIC = ("best", "cooldown_counter", "num_bad_epochs", "last_epoch", "_last_lr")


@dataclass(frozen=True)
class InitialHyperparameters:
    """Hyperparameters of objects before a resume; make it with `of`.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        >>> built = InitialHyperparameters.of({"optimizer": optimizer})
        >>> optimizer.param_groups[0]["lr"] = 0.5
        >>> built.set_learning_rates(optimizer)
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """

    groups: Mapping[int, list[dict[str, Any]]] = field(default_factory=dict)
    schedules: dict[int, dict[str, Any]] = field(default_factory=dict)
    frozen: Mapping[int, dict[str, bool]] = field(default_factory=dict)
    modes: Mapping[int, dict[nn.Module, bool]] = field(default_factory=dict)

    @classmethod
    def of(cls, objects: Mapping[str, object]) -> InitialHyperparameters:
        """Copy the hyperparameters of all optimizers, schedules and modules among the objects."""
        found = list(all_objects(objects))
        return cls(
            groups={id(o): _options(o) for o in found if isinstance(o, Optimizer)},
            schedules={
                id(s): copy.deepcopy(s.state_dict()) for s in found if isinstance(s, LRScheduler)
            },
            frozen={
                id(m): {name: p.requires_grad for name, p in named_parameters(m)}
                for m in found
                if isinstance(m, nn.Module)
            },
            modes={
                id(m): {part: part.training for part in m.modules()}
                for m in found
                if isinstance(m, nn.Module)
            },
        )

    def note_schedule(self, scheduler: LRScheduler) -> None:
        """Add a schedule that was built later, before a checkpoint is loaded into it."""
        self.schedules[id(scheduler)] = copy.deepcopy(scheduler.state_dict())

    def set_options(self, optimizer: Optimizer, names: Collection[str]) -> None:
        """Set these hyperparameters to their initial values; not the learning rate."""
        chosen = set(names) - set(_NO_OPTIONS)
        # Groups that were added in training stand behind the others, and keep what they had.
        for group, built in zip(optimizer.param_groups, self.groups[id(optimizer)], strict=False):
            group.update({name: built[name] for name in chosen if name in built})
        if chosen & {"fused", "capturable"}:
            _move_steps(optimizer)

    def set_learning_rates(self, optimizer: Optimizer) -> None:
        """Set the learning rates of an optimizer to their initial values."""
        for group, built in zip(optimizer.param_groups, self.groups[id(optimizer)], strict=False):
            for key in ("lr", "initial_lr"):
                if key in built:
                    _set(group, key, built[key])

    def reschedule(self, scheduler: LRScheduler, *, scale: float = 1.0) -> None:
        """Reset a schedule to its initial settings, at the step of the restored one.

        It is stepped there from its beginning, whatever its class; a `LambdaLR` is a function
        of the step and needs no steps.

        Args:
            scheduler: Just restored.
            scale: One that follows a metric keeps what it knows of it, and its learning rates
                times this.
        """
        built = copy.deepcopy(self.schedules[id(scheduler)])
        if isinstance(scheduler, ReduceLROnPlateau):
            settings = {key: value for key, value in built.items() if key not in _OF_THE_METRIC}
            scheduler.load_state_dict({**scheduler.state_dict(), **settings})
            for group in scheduler.optimizer.param_groups:
                _set(group, "lr", group["lr"] * scale)
            return
        steps = _steps_of(scheduler.state_dict()) - _steps_of(built)
        self.set_learning_rates(scheduler.optimizer)
        if type(scheduler) is LambdaLR:
            now = {"last_epoch": scheduler.last_epoch, "_step_count": scheduler._step_count}  # noqa: SLF001
            scheduler.load_state_dict({**built, **now})  # functions that are objects have state
            _jump(scheduler)
            return
        scheduler.load_state_dict(built)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of stepping a schedule before its optimizer
            for _ in range(steps):
                scheduler.step()

    def set_modes(self, module: nn.Module) -> None:
        """Put the parts of a module into training or evaluation mode as this start did."""
        for part, training in self.modes[id(module)].items():
            part.training = training

    def set_frozen(self, module: nn.Module) -> None:
        """Freeze and unfreeze the parameters of a module as this start did."""
        built = self.frozen[id(module)]
        for name, parameter in named_parameters(module):
            is_trained = built.get(name, parameter.requires_grad)  # else it came in training
            parameter.requires_grad_(is_trained)
            if not is_trained:
                parameter.grad = None


def _steps_of(state: Mapping[str, Any]) -> int:
    """Return how often a schedule was stepped; of a composed one, the most of its parts."""
    if "last_epoch" in state:
        return int(state["last_epoch"])
    return max(_steps_of(inner) for inner in state["_schedulers"])


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {key: _own(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    """Set an option; a tensor is filled in place, for graphs and compiled steps that hold it."""
    if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
        group[key].copy_(value)
    else:
        group[key] = _own(value)


def _move_steps(optimizer: Optimizer) -> None:
    """Move step counters to the device that the kernel of each group needs."""
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].to(parameter.device if on_device else "cpu")


def _jump(scheduler: LambdaLR) -> None:
    """Set the learning rates of the current step, as the functions of the schedule give them."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
        _set(group, "lr", group["initial_lr"] * factor(scheduler.last_epoch))
    scheduler._last_lr = _rates(groups)  # noqa: SLF001 (what get_last_lr returns)


def _rates(groups: Iterable[dict[str, Any]]) -> list[Any]:
    return [_own(group["lr"]) for group in groups]


# Changes that were named take effect: what is meant is set anew over the stored state.


NOT_LOADED = "not loaded: skip names it"


def take_effect(
    differences: Iterable[Difference], built: InitialHyperparameters, objects: Mapping[str, Any]
) -> None:
    """Set hyperparameters, schedules and frozen parameters to the values of this start.

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


def apply_settings(
    differences: Iterable[Difference],
    built: InitialHyperparameters,
    *,
    optimizer: object,
    scheduler: object,
    options: Mapping[str, Sequence[str]],
    of_schedule: Collection[str],
    step: int,
) -> None:
    """Apply changed settings over the restored state; the optimizer's moments are kept.

    A schedule that `skip` names begins anew, as it was built, whatever else changed.

    Args:
        differences: Those that were allowed; their paths are names of settings.
        built: The objects before the resume.
        optimizer: Just restored; of one that no setting makes, None.
        scheduler: Likewise.
        options: The options of an optimizer that each setting makes.
        of_schedule: The settings that make a schedule.
        step: Where the run is.
    """
    changed = {difference.path: difference for difference in differences}
    if isinstance(optimizer, Optimizer):
        built.set_options(optimizer, [one for name in changed for one in options.get(name, ())])
    is_remade = not changed.keys().isdisjoint({*of_schedule, "optim"})
    is_remade = is_remade or any(map(is_another_schedule, changed.values()))
    is_reset = "scheduler" in changed and changed["scheduler"].effect == NOT_LOADED
    if not is_remade or is_reset or not isinstance(scheduler, LRScheduler):
        return
    if isinstance(scheduler, LambdaLR) and scheduler.last_epoch == 0:
        scheduler.last_epoch = step  # it took the place of another
    rate = changed.get("learning_rate")
    built.reschedule(scheduler, scale=1.0 if rate is None else ratio(rate))


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
    """Return the new number divided by the old one; 1 for other values."""
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
