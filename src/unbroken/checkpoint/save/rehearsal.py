"""What could not be saved is known before the first step, or right after it: not at the first save.

The state of an optimizer comes with its first step, and that of loaders and callbacks with the
first batch. So what a save would meet is looked at twice: at the start, and after one step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from unbroken.capture import capture, refuse_what_cannot_be_stored
from unbroken.checkpoint.save.layout import Layout
from unbroken.checkpoint.save.staging import flattened
from unbroken.distributed import Group


class Rehearsal:
    """Looks once at all that a save would store; nothing is copied, and nothing is written.

    Args:
        objects: What is saved, by name.
    """

    def __init__(self, objects: Mapping[str, object]) -> None:
        self._objects = objects
        self._hooks: dict[Optimizer, tuple[RemovableHandle, RemovableHandle]] = {}
        self._open: Counter[Optimizer] = Counter()
        self._begun_at: int | None = None

    def at_the_start(self, group: Group) -> None:
        """Look at modules, optimizers and the like; objects of other kinds are not asked yet.

        Raises:
            CaptureError: Something in them cannot be stored.
        """
        group.run_on_all("capture the state", lambda: self._look(asks=False))

    def begin(self, step: int) -> None:
        """Let each optimizer be looked at after its first step, whoever calls that."""
        self.end()
        self._begun_at = step
        for one in map(_stepping, flattened(self._objects)):
            if isinstance(one, Optimizer) and one not in self._hooks:
                begins = one.register_step_pre_hook(self._step_begins)
                self._hooks[one] = begins, one.register_step_post_hook(self._step_is_over)

    def after_a_step(
        self,
        step: int,
        group: Group,
        values: Callable[[], Any],
        layout: Callable[[Mapping[str, object]], Layout],
    ) -> None:
        """Look at everything, unless that was done; called between two steps.

        Args:
            step: Completed steps.
            group: The ranks, each of which calls this.
            values: Returns what would be saved with the objects.
            layout: How the folder would look.

        Raises:
            CaptureError: Something cannot be stored.
            RankError: That happened on another rank.
        """
        if not self._waits(step):
            return
        self.end()

        def look() -> None:
            self._look(values())
            described = layout(self._objects)
            if group.rank == 0:
                described.files()

        group.run_on_all("capture the state", look)

    def has_saved(self, step: int) -> None:
        """Look no more after the save of this step, if it is one after the start."""
        if self._waits(step):
            self.end()

    def _waits(self, step: int) -> bool:
        return self._begun_at is not None and step > self._begun_at

    def end(self) -> None:
        """Look no more: the run is over."""
        self._begun_at = None
        for one in list(self._hooks):
            self._let_go(one)

    def _look(self, values: Any = None, *, asks: bool = True) -> None:
        tree = capture(self._objects, asks=asks)
        refuse_what_cannot_be_stored({**tree, "values": values})

    def _step_begins(self, optimizer: Optimizer, *_: Any) -> None:
        self._open[optimizer] += 1  # torch calls hooks again for a step that calls super().step

    def _step_is_over(self, optimizer: Optimizer, *_: Any) -> None:
        self._open[optimizer] -= 1
        if self._open[optimizer] <= 0 and not torch.compiler.is_compiling():
            self._let_go(optimizer)
            self._look(asks=False)

    def _let_go(self, optimizer: Optimizer) -> None:
        for hook in self._hooks.pop(optimizer, ()):
            hook.remove()
        self._open.pop(optimizer, None)


def _stepping(value: object) -> object:
    """Return the optimizer in a wrapper that has no hooks of its own, as accelerate's has none."""
    is_face = isinstance(value, Optimizer) and not hasattr(value, "_optimizer_step_pre_hooks")
    return getattr(value, "optimizer", value) if is_face else value
