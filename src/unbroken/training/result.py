"""What `Trainer.train` returns."""

from __future__ import annotations

from dataclasses import dataclass

from unbroken.checkpoint import ResumeReport
from unbroken.training.progress import Progress


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        progress: Where it ended.
        stopped_by: Why it ended before `max_steps`, or None.
        best_metric: The best value of `metric_for_best_model`, or None.
        resume_report: How this process's part of the run began.
    """

    progress: Progress
    stopped_by: str | None
    best_metric: float | None
    resume_report: ResumeReport
