"""What the user's callbacks have come to, as named state; kept in their own objects."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers.trainer_callback import ExportableState


class CallbackState:
    """The state of one callback: by `state_dict`, or by the host's `state()`.

    Args:
        callback: It has one of the two.

    Example:
        >>> from transformers import EarlyStoppingCallback
        >>> patience = EarlyStoppingCallback(early_stopping_patience=3)
        >>> CallbackState(patience).state_dict()
        {'early_stopping_patience_counter': 0}
    """

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def state_dict(self) -> Any:
        """Return what training has made of it; not what it was built with."""
        if _has_state_dict(self.callback):
            return self.callback.state_dict()
        return copy.deepcopy(self.callback.state().get("attributes", {}))

    def load_state_dict(self, state: Any) -> None:
        """Put it back into the same object."""
        if _has_state_dict(self.callback):
            self.callback.load_state_dict(state)
            return
        for name, value in state.items():
            setattr(self.callback, name, value)


def named(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Return callbacks by the names of their classes: the second of a class is "Name#2".

    Example:
        >>> from transformers import EarlyStoppingCallback
        >>> list(named([EarlyStoppingCallback(), EarlyStoppingCallback()]))
        ['EarlyStoppingCallback', 'EarlyStoppingCallback#2']
    """
    found: dict[str, Any] = {}
    for callback in callbacks:
        name = plain = type(callback).__name__
        number = 1
        while name in found:
            number += 1
            name = f"{plain}#{number}"
        found[name] = callback
    return found


def callback_states(callbacks: Iterable[Any]) -> dict[str, CallbackState]:
    """Return all callbacks that have a state, by their names.

    Example:
        >>> from transformers import EarlyStoppingCallback, ProgressCallback
        >>> list(callback_states([ProgressCallback(), EarlyStoppingCallback()]))
        ['EarlyStoppingCallback']
    """
    return {
        name: CallbackState(callback)
        for name, callback in named(callbacks).items()
        if _has_state_dict(callback) or isinstance(callback, ExportableState)
    }


def _has_state_dict(callback: Any) -> bool:
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")
