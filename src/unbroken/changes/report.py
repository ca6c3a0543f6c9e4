"""What a start found: the value that is printed, kept in history.jsonl and given to the caller."""

from __future__ import annotations

from dataclasses import dataclass, field

from unbroken.changes.differences import Difference, Word, overall
from unbroken.store import Rejection
from unbroken.stored_names import to_stored


@dataclass(frozen=True)
class ResumeReport:
    """How a segment of a run began.

    Attributes:
        step: Completed optimizer steps in the state training goes on from; 0 for a fresh start.
        checkpoint: The folder that was resumed, or None for a fresh start.
        rejected: Newer checkpoints that could not be used, and why.
        set_aside: Checkpoints of an abandoned future that were renamed, as (old, new) names.
        differences: Settings that are not what they were when the checkpoint was saved.
        same: All else that was compared, with the verdict "same".
        previous_owner: Who held the run directory and died holding it, if anybody.
    """

    step: int
    checkpoint: str | None = None
    rejected: tuple[Rejection, ...] = ()
    set_aside: tuple[tuple[str, str], ...] = ()
    previous_owner: str | None = None
    differences: tuple[Difference, ...] = ()
    same: tuple[Difference, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Word:
        """The one word for this start: "exact", "equivalent", "not covered" or "changed"."""
        return overall(self.differences)

    @property
    def table(self) -> tuple[Difference, ...]:
        """All that was compared: what differs, the gravest first, then what is the same."""
        return (*self.differences, *self.same)

    @property
    def resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.checkpoint is not None

    def lines(self) -> list[str]:
        """Return the report as lines of text, the most important first.

        Example:
            >>> ResumeReport(step=0).lines()
            ['no checkpoint yet: starting at step 0']
        """
        return [*self.heading(), *map(str, self.differences), *self.notes]

    def heading(self) -> list[str]:
        """Return the lines without the differences and notes.

        Example:
            >>> ResumeReport(step=8, checkpoint="runs/a/checkpoint-8").heading()
            ['resuming from runs/a/checkpoint-8 (step 8): exact']
        """
        word = "not known to be exact" if self.verdict == "not covered" else self.verdict
        head = (
            f"resuming from {self.checkpoint} (step {self.step}): {word}"
            if self.resumed
            else f"no checkpoint yet: starting at step {self.step}"
        )
        rejected = [f"not used: {item.folder}: {item.reason}" for item in self.rejected]
        moved = [f"set aside: {old} is now {new}" for old, new in self.set_aside]
        owner = (
            [f"took over from a process that died: {self.previous_owner}"]
            if self.previous_owner is not None
            else []
        )
        return [head, *rejected, *moved, *owner]

    def to_json(self) -> dict[str, object]:
        """Return the report as plain JSON values, for history.jsonl; without what is the same."""
        return {
            "step": self.step,
            "checkpoint": self.checkpoint,
            "verdict": self.verdict if self.resumed else None,
            "rejected": [
                {"checkpoint": item.folder, "reason": item.reason} for item in self.rejected
            ],
            "set_aside": [{"from": old, "to": new} for old, new in self.set_aside],
            "differences": [to_stored(difference) for difference in self.differences],
            "previous_owner": self.previous_owner,
            "notes": list(self.notes),
        }
