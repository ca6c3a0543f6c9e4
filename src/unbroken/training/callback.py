"""Hooks for users: few, called at step edges, with the trainer as the only argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unbroken.training.trainer import Trainer


class Callback:
    """Something that follows a run; override what you need.

    Whatever a callback must remember belongs into `state_dict`: it is saved with every
    checkpoint and given back to `load_state_dict` on resume, so that two callbacks of one class
    keep their own.

    Example:
        >>> class StopAtLoss(Callback):
        ...     def on_log(self, trainer, statistics):
        ...         if statistics["loss"] < 0.1:
        ...             trainer.stop("loss is low enough")
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Called once in each process, after resuming and before the first step."""

    def on_micro_batch_end(self, trainer: Trainer) -> None:
        """Called after each backward pass, the optimizer's step still to come."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after each optimizer step."""

    def on_log(self, trainer: Trainer, statistics: Mapping[str, Any]) -> None:
        """Called after statistics were written."""

    def on_evaluate(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation."""

    def on_save(self, trainer: Trainer, checkpoint: str) -> None:
        """Called after each commit of a checkpoint, with its folder."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Called once when the run reached its end."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


def is_default(hook: Callable[..., None]) -> bool:
    """Return whether a callback's hook is the empty one of `Callback`.

    Example:
        >>> is_default(Callback().on_step_end)
        True
    """
    own = getattr(hook, "__func__", None)
    return own is not None and own is getattr(Callback, own.__name__, None)
