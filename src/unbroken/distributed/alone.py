"""A run of one process, which has nobody to ask."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from unbroken.store import Json

T = TypeVar("T")


class Alone:
    """The group of one process, without `torch.distributed`; never waits.

    Example:
        >>> Alone().sum([0.5, 2])
        [0.5, 2.0]
    """

    rank: ClassVar[int] = 0
    world_size: ClassVar[int] = 1
    local_rank: ClassVar[int] = 0

    def gather(self, what: str, value: Json) -> list[Json]:
        """Return the value, as JSON keeps it."""
        return [json.loads(json.dumps(value))]

    def share(self, what: str, value: Json = None) -> Json:
        """Return the value, as JSON keeps it."""
        return self.gather(what, value)[0]

    def agree(self, what: str, value: Json) -> None:
        """Agree with itself."""
        self.gather(what, value)

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Run the action."""
        return action()

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return bool(flag)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values, as float64."""
        return [float(value) for value in values]

    def apart(self) -> Alone:
        """Return another one that is alone."""
        return Alone()

    def close(self) -> None:
        """Do nothing: there is no group to leave."""
