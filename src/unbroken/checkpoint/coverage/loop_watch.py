"""Watching a hand-written loop: what steers it and was not given, gradients that wait, its steps.

A Trainer gives all that it depends on, and needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from unbroken.capture import (
    Captured,
    ParameterNames,
    all_objects,
    check_gradients,
    is_sharded,
    restore_gradients,
)
from unbroken.changes.differences import Difference
from unbroken.checkpoint.coverage.around import AroundLoop
from unbroken.checkpoint.coverage.attributes import Attributes
from unbroken.checkpoint.coverage.schedules import FoundSchedules
from unbroken.checkpoint.coverage.unregistered import NotGiven
from unbroken.distributed import Group
from unbroken.errors import ConfigError, CorruptCheckpointError, UnbrokenError, spelled
from unbroken.recorder.step_hooks import StepHooks


class LoopWatch:
    """Finds what steers the objects of a hand-written loop, or trains them, and was not given.

    From the first look on it is there at each step of any optimizer.

    Args:
        objects: The registered objects, by name; schedules that are found are added.
        attributes: Those that are saved though they are none of these.
        tell: Called with each line about what is found between two looks.
        on_batch: Called with each batch of a loader that was not given.

    Attributes:
        around: What objects hold that stand in the frames of the loop.
        schedules: Those that were found on the optimizers.
        gradients: Those that wait for a step.
    """

    def __init__(
        self,
        objects: dict[str, object],
        attributes: Attributes,
        tell: Callable[[str], None],
        on_batch: Callable[[Any], object],
    ) -> None:
        self.around = AroundLoop(objects, attributes)
        self.schedules = FoundSchedules(objects)
        self.gradients = UnfinishedGradients(objects)
        self._not_given = NotGiven(objects, attributes.covers)
        self._tell, self._on_batch = tell, on_batch
        self._step_hook: StepHooks | None = None

    def look(self) -> None:
        """Look for schedules, and tell of each; from now on, at each first step of a start."""
        for line in self.lines():
            self._tell(line)

    def lines(self) -> list[str]:
        """Do what `look` does, and return the lines."""
        if self.schedules.looked_just_now():
            return []
        if self._step_hook is None:
            self._step_hook = StepHooks(self._before_step)
            self._not_given.begin(self._on_batch)
        return self.schedules.look()

    def look_back(self, values: Any) -> tuple[Difference, ...]:
        """Return what the training until now had, and a save with these values has not.

        Raises:
            DataError: Batches were trained on, and none was marked as used.
        """
        if self._step_hook is None:
            return ()
        self._not_given.require_used()
        return self._not_given.found(values)

    def holds(self, thing: object) -> bool:
        """Return whether a thing is registered, or a part of what is."""
        return self._not_given.holds(thing)

    def end(self) -> None:
        """Look no longer."""
        hook, self._step_hook = self._step_hook, None
        if hook is not None:
            hook.end()
            self._not_given.end()
        self.around.end()

    def _before_step(self, optimizer: Optimizer) -> None:
        if not self.schedules.is_checked:
            try:
                lines = self.schedules.before_step(optimizer)
            except UnbrokenError as error:
                error.respell(partial(spelled, place="loop"))
                raise
            for line in lines:
                self._tell(line)
        self._not_given.before_step(optimizer)
        self.gradients.before_step(optimizer)


# Gradients that the loop has gathered when it saves, for a step still to come.


GRADIENTS = "unfinished_gradients"
"""Where they stand in a state tree: no registered object has this name."""

_MARKS = 8  # parameters of each optimizer that are looked at in each step
_PART = 1 << 21  # bytes looked at at once: the first part that is not zero ends the search


class UnfinishedGradients:
    """The gradients of registered parameters that the next step is going to use.

    A loop that clears them before each backward pass, with `set_to_none`, leaves those of the last
    step behind: they are not stored. Until that was seen, and wherever they were added to since,
    they are.

    """

    def __init__(self, objects: Mapping[str, object]) -> None:
        self._objects = objects
        self._at_step: dict[int, list[Any]] = {}
        self._clears: dict[int, bool] = {}
        self._marked: dict[int, tuple[Optimizer, int, list[torch.Tensor]]] = {}

    def before_step(self, optimizer: Optimizer) -> None:
        """Take note of the gradients that a registered optimizer uses now."""
        known = self._marked.get(id(optimizer))
        if known is None or known[0] is not optimizer or known[1] != len(optimizer.param_groups):
            is_own = any(one is optimizer for one in all_objects(self._objects))
            known = (optimizer, len(optimizer.param_groups), _marks(optimizer) if is_own else [])
            self._marked[id(optimizer)] = known
            self._at_step.pop(id(optimizer), None)  # of other parameters
            self._clears.pop(id(optimizer), None)
        if not known[2]:
            return
        marks = [one.grad for one in known[2]]
        before = self._at_step.get(id(optimizer))
        if before is not None:
            pairs = zip(before, marks, strict=False)
            self._clears[id(optimizer)] = all(
                old is None or old[0]() is not now for old, now in pairs
            )
        self._at_step[id(optimizer)] = [_signed(one) for one in marks]

    def on_all(self, group: Group) -> dict[str, Any]:
        """Return what is to be saved of them; on all ranks where one has any."""
        found = self.capture()
        return {GRADIENTS: found} if group.any(found is not None) else {}

    def capture(self) -> Captured | None:
        """Return the gradients by the names of their parameters, or None where there are none."""
        having = [(one, one.grad) for one in self._parameters() if one.grad is not None]
        if not having:
            return None
        names = ParameterNames(self._objects)
        found = {names.of(one): grad for one, grad in having}
        by_name = {name: grad for name, grad in found.items() if name is not None}
        zero = [name for name, grad in by_name.items() if _is_zero(grad)]
        rest = {name: grad for name, grad in by_name.items() if name not in zero}
        if not by_name:
            return None
        return Captured("gradients", "Gradients", {"parameters": rest, "zero": zero}, {})

    def _parameters(self) -> Iterator[torch.Tensor]:
        """Yield parameters each once, without those whose gradients were used already."""
        seen: set[int] = set()
        used = [one for one in all_objects(self._objects) if self._has_used(one)]
        for optimizer in used:
            seen.update(id(one) for one in _parameters_of(optimizer))
        for value in all_objects(self._objects):
            for one in _parameters_of(value):
                if id(one) not in seen:
                    seen.add(id(one))
                    yield one

    def _has_used(self, optimizer: object) -> bool:
        """Return whether all that is left of gradients is going to be cleared."""
        known, before = self._marked.get(id(optimizer)), self._at_step.get(id(optimizer))
        if known is None or before is None or not self._clears.get(id(optimizer), False):
            return False
        if known[0] is not optimizer or known[1] != len(known[0].param_groups):
            return False  # a group came since the step, and may have gradients
        return all(_is_same(old, one.grad) for old, one in zip(before, known[2], strict=True))

    def check(self, stored: object) -> dict[str, Any]:
        """Return the gradients that a checkpoint holds; raise where they do not fit.

        Raises:
            StateMismatchError: One has no parameter here, or another shape.
        """
        if stored is None:
            return {}
        state = stored.state if isinstance(stored, Captured) else None
        if not isinstance(state, dict) or not isinstance(state.get("parameters"), dict):
            raise CorruptCheckpointError(GRADIENTS, "are no gradients by name")
        live, zero = self._by_name(), state.get("zero") or []
        found = {
            **state["parameters"],
            **{name: torch.zeros_like(live[name]) for name in zero if name in live},
        }
        check_gradients(live, found)
        return found

    def restore(self, found: Mapping[str, Any]) -> None:
        """Give each parameter the gradient that it had, or none."""
        restore_gradients(self._by_name(), found)
        self._at_step, self._clears = {}, {}

    def _by_name(self) -> dict[str, torch.Tensor]:
        names = ParameterNames(self._objects)
        every = (one for value in all_objects(self._objects) for one in _parameters_of(value))
        return {name: one for one in every if (name := names.of(one)) is not None}


def _parameters_of(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Optimizer):
        for group in value.param_groups:
            yield from group["params"]


def _marks(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return some parameters of an optimizer, spread over all."""
    groups = optimizer.param_groups
    marks: list[torch.Tensor] = []
    for group in groups[:_MARKS]:
        own = group["params"]
        count = min(len(own), max(1, _MARKS // len(groups[:_MARKS])))
        marks += [own[at * len(own) // count] for at in range(count)]
    return marks


def _signed(gradient: torch.Tensor | None) -> tuple[Any, int] | None:
    """Return what tells whether a gradient is the same object, and was not changed."""
    return None if gradient is None else (ref(gradient), gradient._version)  # noqa: SLF001


def _is_same(old: tuple[Any, int] | None, now: torch.Tensor | None) -> bool:
    """Return whether a gradient is the same object as before, and was not changed."""
    if old is None or now is None:
        return old is None and now is None
    return old[0]() is now and old[1] == now._version  # noqa: SLF001 (no public name)


def _is_zero(gradient: torch.Tensor) -> bool:
    """Return whether a gradient is cleared in place; of parts on other ranks nobody asks."""
    if is_sharded(gradient) or gradient.layout is not torch.strided:
        return False
    flat = gradient.detach().reshape(-1).view(torch.uint8)  # -0.0 is not 0.0
    is_aligned = len(flat) % 8 == 0 and flat.storage_offset() % 8 == 0
    words = flat.view(torch.int64) if is_aligned else flat  # eight at once take a fifth of the time
    size = _PART // words.element_size()
    return not any(bool(words[at : at + size].any()) for at in range(0, len(words), size))


# Which steps of a loop count.


class StepsSeen:
    """Sees the steps of registered optimizers, and those that a registered scaler skips.

    Args:
        objects: The registered objects, by name.
        holds: Whether an object is registered, or a part of what is.

    Attributes:
        has_stepped: Whether an optimizer has stepped since `turn_begins`.
    """

    def __init__(self, objects: Mapping[str, object], holds: Callable[[object], bool]) -> None:
        self.has_stepped = False
        self._objects, self._holds = objects, holds
        self._known: dict[int, tuple[Optimizer, bool]] = {}
        self._scalers: list[GradScaler] = []
        self._scales: list[tuple[GradScaler, torch.Tensor | float]] = []
        self._hooks: StepHooks | None = None

    def begin(self) -> None:
        """Look from now on, until `end`."""
        self._known = {}
        scalers = [one for one in all_objects(self._objects) if isinstance(one, GradScaler)]
        self._scalers = [one for one in scalers if one.is_enabled()]
        self._hooks = StepHooks(self._before_step, self._after_step, is_traced=True)

    def end(self) -> None:
        """Look no longer."""
        if self._hooks is not None:
            self._hooks.end()
        self._hooks, self._scales = None, []

    def turn_begins(self) -> None:
        """Forget the turn before."""
        self.has_stepped = False
        self._scales = [(one, _scale_of(one)) for one in self._scalers]

    def counts_without_a_step(self) -> bool:
        """Return whether a turn in which no optimizer stepped is a step all the same.

        It is one where a scaler has skipped it, which then lowers its scale; and where there is no
        optimizer at all.
        """
        if not self._has_optimizer():
            return True
        return any(bool(_scale_of(one) < before) for one, before in self._scales)

    def waits_for_a_step(self) -> bool:
        """Return whether gradients were gathered for a step still to come."""
        optimizers = [one for one in all_objects(self._objects) if isinstance(one, Optimizer)]
        groups = [group for one in optimizers for group in one.param_groups]
        return any(p.grad is not None for group in groups for p in group["params"])

    def _has_optimizer(self) -> bool:
        known = any(is_own for _, is_own in self._known.values())
        return known or any(isinstance(one, Optimizer) for one in all_objects(self._objects))

    def _before_step(self, optimizer: Optimizer) -> None:
        """Refuse a step of which no checkpoint would know anything."""
        if torch.compiler.is_compiling():
            return
        known = self._known.get(id(optimizer))
        if known is None or known[0] is not optimizer:
            self._known[id(optimizer)] = (optimizer, self._holds(optimizer))
            if not self._has_optimizer():
                kind = type(optimizer).__name__
                what = f"this {kind} steps, and the Checkpointer was given no optimizer"
                raise ConfigError("optimizer", what, hint="Checkpointer(..., optimizer=optimizer)")

    def _after_step(self, optimizer: Optimizer) -> None:
        # While a step is compiled this is traced, and run again in each step: it must be simple.
        is_own = torch.compiler.is_compiling() or self._known[id(optimizer)][1]
        if is_own:
            self.has_stepped = True


def _scale_of(scaler: GradScaler) -> torch.Tensor | float:
    """Return the factor of a scaler, without waiting for a device."""
    scale = scaler._scale  # noqa: SLF001 (get_scale waits)
    return float(scaler._init_scale) if scale is None else scale.detach().clone()  # noqa: SLF001
