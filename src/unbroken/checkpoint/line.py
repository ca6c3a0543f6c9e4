"""The line of checkpoints that a run makes: what the next one comes after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from unbroken.checkpoint.candidates import Origin
from unbroken.checkpoint.layout import Layout
from unbroken.checkpoint.writing import Writing
from unbroken.errors import ConfigError, StateMismatchError
from unbroken.store import CheckpointReader, Json, KeepPolicy, RunDirectory

if TYPE_CHECKING:
    from unbroken.checkpoint.resuming import Resumption


class Line:
    """Follows the checkpoints of one run; each new one tells where the line began.

    Attributes:
        has_begun: Whether what is to be saved comes from the checkpoints that are there.
        origin: Facts of the checkpoint of another run that this one began in.
        skipped: What was not loaded then.
        is_torn: Whether a resume that failed has left the objects with parts of a checkpoint.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self.is_torn = False
        self.origin: Origin = {}
        self.skipped: tuple[str, ...] = ()
        self._last: Callable[[], CheckpointReader | None] = lambda: None

    def resumed(self, resumption: Resumption, checkpoint: CheckpointReader | None) -> None:
        """Go on from a checkpoint, every byte of which was read; None: one of elsewhere."""
        self.has_begun = True
        self.origin, self.skipped = resumption.origin, resumption.skipped
        self._last = lambda: checkpoint

    def refuse_another(self, run: RunDirectory) -> None:
        """Raise where a run with checkpoints would get a second, unrelated line of them.

        Raises:
            ConfigError: It would.
            StateMismatchError: What is to be saved is no whole state.
        """
        refuse_torn(run, is_torn=self.is_torn)
        found = () if self.has_begun else run.catalog.folders()
        if found:
            raise ConfigError(
                run.storage.describe(),
                "holds checkpoints that were not resumed",
                found=f"steps {[step for step, _ in found]}",
                hint='call resume() first; resume("never") starts anew and sets them aside',
            )
        self.has_begun = True

    def facts(self) -> dict[str, Json]:
        """Return what the manifest of a checkpoint tells of the line."""
        return {"origin": None, **self.origin, "skip": list(self.skipped)}

    def next(
        self,
        run: RunDirectory,
        step: int,
        layout: Layout,
        facts: Mapping[str, Json],
        keep: KeepPolicy,
        clock: Callable[[], float],
        told: Mapping[str, Json],
    ) -> Writing:
        """Return the next checkpoint, to be written; files like those of the last are linked."""
        last = self._last()
        made = Writing(run, step, layout, facts, keep, like=last, clock=clock, told=told)
        self._last = lambda: made.made
        return made


def refuse_torn(run: RunDirectory, *, is_torn: bool) -> None:
    """Raise where a line of checkpoints would begin in objects with parts of an old one.

    Raises:
        StateMismatchError: They hold such parts.
    """
    if is_torn:
        raise StateMismatchError(
            run.storage.describe(),
            "the objects hold parts of a checkpoint that turned out to be damaged",
            hint="build them anew, or start the process again",
        )
