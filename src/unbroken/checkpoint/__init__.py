"""Saving and resuming a run: which objects, when, from what, and until which signal."""

from unbroken.checkpoint.checkpointer import Checkpointer as Checkpointer
from unbroken.checkpoint.policy import Cadence as Cadence
from unbroken.checkpoint.policy import Timer as Timer
from unbroken.checkpoint.preemption import EXIT_STOPPED as EXIT_STOPPED
from unbroken.checkpoint.preemption import Preemption as Preemption
from unbroken.checkpoint.preemption import TrainingStopped as TrainingStopped
from unbroken.checkpoint.report import ResumeReport as ResumeReport
from unbroken.checkpoint.selection import ResumeFrom as ResumeFrom
from unbroken.checkpoint.selection import Selection as Selection

__all__ = [
    "EXIT_STOPPED",
    "Cadence",
    "Checkpointer",
    "Preemption",
    "ResumeFrom",
    "ResumeReport",
    "Selection",
    "Timer",
    "TrainingStopped",
]
