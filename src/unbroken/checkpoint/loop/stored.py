"""What a checkpoint holds of a loop: its place in an epoch, and what the loop's code keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unbroken.errors import ConfigError

_PLACE, _STATE = "loop.place", "loop.state"
_EPOCH, _ENTERED, _STOPPED = "loop.epoch", "loop.entered", "loop.stopped"
_BEGAN = "loop.began_with"


class LoopState(dict[str, Any]):
    """Running sums, bests and the like: saved with each checkpoint, and brought back.

    What is set before the loop is its beginning; a resume puts the saved values in its place.
    Values are plain ones and tensors.

    Example:
        >>> state = LoopState()
        >>> state.best = 1.5
        >>> state["best"], state
        (1.5, {'best': 1.5})
    """

    def __getattr__(self, name: str) -> Any:
        """Return a value by its name."""
        try:
            return self[name]
        except KeyError:
            hint = f"set it before the loop: run.state.{name} = ..."
            error = AttributeError(f"run.state has no {name!r}")
            error.add_note(hint)
            raise error from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a value by its name."""
        if hasattr(type(self), name):
            hint = f"run.state[{name!r}] = ..."
            raise ConfigError(f"run.state.{name}", "this name is taken", hint=hint)
        self[name] = value

    def __delattr__(self, name: str) -> None:
        """Remove a value."""
        del self[name]

    def put(self, values: Mapping[str, Any]) -> None:
        """Hold these values alone."""
        self.clear()
        self.update(values)


@dataclass(frozen=True)
class StoredLoop:
    """What a checkpoint says of the loop.

    Attributes:
        state: What the loop's code keeps.
        epoch: The epoch that the place lies in, or that comes next; None: the loop has none.
        entered: The generators and the state at the begin of that epoch, if it was begun.
        stopped: The `until` of the loop that was ended by `stop`, if it was.
        began_with: The names that the state of the fresh run began with.
        is_of_loop: Whether the checkpoint is that of such a loop.
    """

    state: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    entered: tuple[dict[str, Any], dict[str, Any]] | None = None
    stopped: Sequence[int | None] = ()
    began_with: Sequence[str] = ()
    is_of_loop: bool = True

    @classmethod
    def of(cls, values: Any) -> StoredLoop:
        """Return what stands in the values of a checkpoint."""
        place = values.get(_PLACE) if isinstance(values, Mapping) else None
        if not isinstance(place, Mapping):
            return cls(is_of_loop=False)
        entered, stopped = place.get(_ENTERED), place.get(_STOPPED) or ()
        start = (entered[0], entered[1]) if isinstance(entered, list) else None
        return cls(values[_STATE], place.get(_EPOCH), start, stopped, place.get(_BEGAN) or ())

    def with_new(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state, with what this start has set that the run did not begin with."""
        new = {name: one for name, one in state.items() if name not in self.began_with}
        return {**new, **self.state}

    def values(self) -> dict[str, Any]:
        """Return the values for a checkpoint."""
        entered = None if self.entered is None else [*self.entered]
        place = {
            _EPOCH: self.epoch,
            _ENTERED: entered,
            _STOPPED: [*self.stopped],
            _BEGAN: [*self.began_with],
        }
        return {_PLACE: place, _STATE: self.state}


def values_of_user(values: Any) -> Any:
    """Return of what is saved beside the objects what the loop's own code has put there."""
    is_of_loop = isinstance(values, Mapping) and _PLACE in values
    return values[_STATE] if is_of_loop else values
