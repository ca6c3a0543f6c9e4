"""Hooks around the steps of all optimizers that may be ended in any thread, at any moment.

`torch.optim` calls its global hooks while it iterates over a dict. If one is removed meanwhile, by
another thread or by the garbage collector inside a hook, the step in progress ends with
"OrderedDict mutated during iteration". So a hook that ends stays there until the next registration.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

Hook = Callable[[Optimizer], None]

_registered: list[tuple[list[bool], RemovableHandle]] = []  # the list is empty: it has ended


class StepHooks:
    """Calls one method before and one after each step of any optimizer, until `end`.

    It does not keep their object alive, and calls nothing once that is gone.

    Args:
        before: A bound method that is called before each step; None: nothing is.
        after: Another, after each step.
        is_traced: Whether torch.compile traces the methods with a compiled step, so that they run
            in each; they are then kept alive until `end`. If not, they are not called in it.

    Example:
        >>> class Counter:
        ...     steps = 0
        ...     def count(self, optimizer, *_):
        ...         self.steps += 1
        >>> counter = Counter()
        >>> hooks = StepHooks(after=counter.count)
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> optimizer.step()
        >>> hooks.end()
        >>> optimizer.step()
        >>> counter.steps
        1
    """

    def __init__(
        self, before: Hook | None = None, after: Hook | None = None, *, is_traced: bool = False
    ) -> None:
        _remove_ended()
        self._is_on = is_on = [True]  # a list: the hooks look at it, and do not hold this object
        adapted = partial(_when_on, is_on) if is_traced else partial(_weakly, is_on)
        if before is not None:
            _registered.append((is_on, register_optimizer_step_pre_hook(adapted(before))))
        if after is not None:
            _registered.append((is_on, register_optimizer_step_post_hook(adapted(after))))

    def end(self) -> None:
        """Call nothing any more. Calling it twice is harmless."""
        self._is_on.clear()

    def __del__(self) -> None:
        """End with the object that looks."""
        self.end()


def _remove_ended() -> None:
    left = []
    for is_on, handle in _registered:
        if is_on:
            left.append((is_on, handle))
        else:
            handle.remove()
    _registered[:] = left


def _when_on(is_on: list[bool], method: Hook) -> Callable[..., None]:
    def hook(optimizer: Optimizer, *_: Any) -> None:
        if is_on:
            method(optimizer)

    return hook


def _weakly(is_on: list[bool], method: Hook) -> Callable[..., None]:
    found = WeakMethod(method)

    def hook(optimizer: Optimizer, *_: Any) -> None:
        if is_on and not torch.compiler.is_compiling() and (call := found()) is not None:
            call(optimizer)

    return hook
