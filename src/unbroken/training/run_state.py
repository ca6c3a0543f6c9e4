"""What changes while a run goes on, besides weights and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from unbroken.checkpoint import ResumeReport
from unbroken.data import BatchSource, MapSource
from unbroken.distributed import Group
from unbroken.stored_names import to_stored
from unbroken.training.config import TrainerConfig
from unbroken.training.metrics import Statistics
from unbroken.training.progress import Progress


@dataclass
class RunState:
    """Where a run is, and what was asked of it; a checkpoint holds all that a resume needs of it.

    Attributes:
        config: The settings in use: `micro_batch_size="auto"` may make portions smaller.
        max_steps: The length of the run.
        progress: How far it is.
        statistics: What it reports about itself, and the best metric so far.
        stop_reason: Why it is to end after the current step, or None.
        save_requested: Whether to save when all that belongs to the step has happened.
        resume_report: How this process's part of the run began.
    """

    config: TrainerConfig
    max_steps: int
    progress: Progress = field(default_factory=Progress)
    statistics: Statistics = field(default_factory=Statistics)
    stop_reason: str | None = None
    save_requested: bool = False
    resume_report: ResumeReport = field(default_factory=lambda: ResumeReport(step=0))

    @property
    def is_finished(self) -> bool:
        """Whether no step is left to take."""
        return self.progress.step >= self.max_steps or self.stop_reason is not None

    def position(self) -> dict[str, Any]:
        """Return where the run is, for a line of statistics."""
        return {"step": self.progress.step, "epoch": round(self.progress.epoch, 6)}

    def to_save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the values that a resume needs, and the facts that it compares first."""
        progress, config = to_stored(self.progress), self.config
        values = {
            "progress": progress,
            "stop_reason": self.stop_reason,
            "micro_batch_size": config.per_forward,
        }
        facts = {"progress": progress, "config": config.to_dict(), "max_steps": self.max_steps}
        return values, facts

    def agree_on_requests(self, group: Group) -> None:
        """Let a stop or a save that one rank's callback asked for be that of all."""
        has_request = self.stop_reason is not None or self.save_requested
        if group.world_size == 1 or not group.any(has_request):
            return
        own = [self.stop_reason, self.save_requested]
        requests: Any = group.gather("what callbacks asked for", own)
        self.stop_reason = next((reason for reason, _ in requests if reason is not None), None)
        self.save_requested = any(requested for _, requested in requests)

    def use_micro_batch(self, size: int, source: BatchSource | None) -> None:
        """Cut batches into micro-batches of this size from here on."""
        if size != self.config.per_forward and isinstance(source, MapSource):
            self.config = self.config.replace(micro_batch_size=size)
            source.split_into(size)

    def already_over(self) -> str:
        """Return the line that a start of a run shows that has come to its end before."""
        where = f"at step {self.progress.step} of {self.max_steps} already"
        if self.progress.step >= self.max_steps:
            return f"finished {where}; nothing to do"
        return f"stopped {where} ({self.stop_reason}); nothing to do"
