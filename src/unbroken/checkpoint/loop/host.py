"""What saves and resumes for a loop, and what a loop needs beside that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from unbroken.changes.differences import ResumeReport
from unbroken.checkpoint.arguments import Clock
from unbroken.checkpoint.confirm import StepConfirmation
from unbroken.checkpoint.coverage.attributes import Attributes
from unbroken.checkpoint.coverage.loop_watch import LoopWatch
from unbroken.checkpoint.resume.selection import ResumeFrom
from unbroken.checkpoint.save.async_saver import SaveCost
from unbroken.distributed import Group


class LoopHost(Protocol):
    """What saves and resumes for a loop: a Checkpointer."""

    group: Group
    confirmation: StepConfirmation
    objects: dict[str, object]
    values: Any

    @property
    def last_save_cost(self) -> SaveCost | None:
        """What the last save took."""

    def register(self, **objects: object) -> None:
        """Add objects to save."""

    def resume(self, which: ResumeFrom = "auto") -> ResumeReport:
        """Put a saved state into the objects."""

    def load(self, step: int, names: Iterable[str]) -> None:
        """Put only these objects back, from the checkpoint of a step."""

    def should_save(self, step: int) -> bool:
        """Return whether a save is due."""

    def rehearse(self, step: int, values: Callable[[], Any] = ...) -> None:
        """Raise, after the first step, what a save would raise."""

    def save(self, step: int, values: Any = None) -> str:
        """Save the objects and these values."""

    def close(self) -> None:
        """Release the run."""

    def wait(self) -> None:
        """Wait until all that was saved is durable."""

    def note_event(self, event: Mapping[str, Any]) -> None:
        """Add to the history of the run."""


@dataclass(frozen=True)
class Around:
    """What a loop needs beside a host.

    Attributes:
        attributes: What training makes of attributes.
        watch: Looks at what was not given; None: all was.
        clock: The clocks.
        tell: Called with each line for the user.
    """

    attributes: Attributes
    watch: LoopWatch | None
    clock: Clock
    tell: Callable[[str], None]
