"""Hooks for users: few, called at step edges, with the trainer as the only argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unbroken.data import derive_key
from unbroken.data.keyed_rng import Randomness
from unbroken.stored_names import stored_class_name, stored_name
from unbroken.training.run_state import RunState

RunningTrainer = Any
"""The Trainer whose run a callback follows.

Not a protocol: a type checker would then refuse a callback that names `Trainer` itself, or a class
of the user's made of it, for the argument of its hooks.
"""


@stored_name("unbroken.training.callback.Callback")
class Callback:
    """Something that follows a run; override what you need.

    Whatever a callback must remember belongs into `state_dict`: it is saved with every
    checkpoint and given back to `load_state_dict` on resume, so that two callbacks of one class
    keep their own. What a hook draws from the global random generators depends on the hook and
    the position in the run alone, so that a resumed run draws the same.

    Example:
        >>> class StopAtLoss(Callback):
        ...     def on_log(self, trainer, statistics):
        ...         if statistics["loss"] < 0.1:
        ...             trainer.stop("loss is low enough")
    """

    def on_train_begin(self, trainer: RunningTrainer) -> None:
        """Called once in each process, after resuming and before the first step."""

    def on_micro_batch_end(self, trainer: RunningTrainer) -> None:
        """Called after each backward pass, the optimizer's step still to come."""

    def on_step_end(self, trainer: RunningTrainer) -> None:
        """Called after each optimizer step."""

    def on_log(self, trainer: RunningTrainer, statistics: Mapping[str, Any]) -> None:
        """Called after statistics were written."""

    def on_evaluate(self, trainer: RunningTrainer, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation."""

    def on_save(self, trainer: RunningTrainer, checkpoint: str) -> None:
        """Called after each commit of a checkpoint; what is changed here is in the next one.

        After a background save (`save_mode`) it is called at the next step boundary.
        """

    def on_train_end(self, trainer: RunningTrainer) -> None:
        """Called once when the run reached its end."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


def overridden(callbacks: Sequence[Callback], hook: str) -> list[Callable[..., None]]:
    """Return the hooks of this name that are not the empty one of `Callback`.

    Example:
        >>> overridden([Callback()], "on_step_end")
        []
    """
    calls = [getattr(callback, hook) for callback in callbacks]
    empty = getattr(Callback, hook)
    return [call for call in calls if getattr(call, "__func__", None) is not empty]


def named(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Return callbacks by names: the class of each, and its number among those of this class.

    So one may be added or taken away without another name for the others.

    Example:
        >>> list(named([Callback(), Callback()]))
        ['0-Callback', '1-Callback']
    """
    found: dict[str, Callback] = {}
    for callback in callbacks:
        place = sum(type(other) is type(callback) for other in found.values())
        found[f"{place}-{stored_class_name(type(callback))}"] = callback
    return found


def with_state(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Return the callbacks that keep a state, by their names.

    Example:
        >>> class Counter(Callback):
        ...     def state_dict(self):
        ...         return {"count": 1}
        >>> list(with_state([Callback(), Counter(), Counter()]))
        ['0-Counter', '1-Counter']
    """
    plain = Callback.state_dict
    return {
        name: one for name, one in named(callbacks).items() if type(one).state_dict is not plain
    }


CallHook = Callable[..., None]
"""`Trainer.call`, which a subclass may have overridden: the name of a hook, and its arguments."""


class Hooks:
    """Calls the callbacks of a run; what they draw depends on the position in the run alone.

    Attributes:
        callbacks: As given; more may be added.
    """

    def __init__(
        self,
        trainer: RunningTrainer,
        callbacks: Sequence[Callback],
        state: RunState,
        randomness: Randomness,
    ) -> None:
        self.callbacks = list(callbacks)
        self._trainer = trainer
        self._state = state
        self._randomness = randomness

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of every callback that has its own."""
        calls = overridden(self.callbacks, hook)
        if calls:
            key = derive_key(self._state.config.seed, hook, self._state.progress.samples)
            with self._randomness.keyed_by(key):
                for call in calls:
                    call(self._trainer, *arguments)
