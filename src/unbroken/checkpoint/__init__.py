"""Saving and resuming a run: which objects, when, from what, and until which signal."""

from unbroken.checkpoint.as_built import AsBuilt as AsBuilt
from unbroken.checkpoint.background import SaveCost as SaveCost
from unbroken.checkpoint.beside import SnapshotMode as SnapshotMode
from unbroken.checkpoint.checkpointer import Checkpointer as Checkpointer
from unbroken.checkpoint.code import code_differences as code_differences
from unbroken.checkpoint.code import code_facts as code_facts
from unbroken.checkpoint.comparison import Comparison as Comparison
from unbroken.checkpoint.comparison import Examine as Examine
from unbroken.checkpoint.comparison import Policy as Policy
from unbroken.checkpoint.differences import Difference as Difference
from unbroken.checkpoint.differences import ExactResume as ExactResume
from unbroken.checkpoint.differences import Rule as Rule
from unbroken.checkpoint.differences import Verdict as Verdict
from unbroken.checkpoint.differences import Word as Word
from unbroken.checkpoint.differences import brief as brief
from unbroken.checkpoint.differences import compare as compare
from unbroken.checkpoint.differences import gravest_first as gravest_first
from unbroken.checkpoint.differences import overall as overall
from unbroken.checkpoint.differences import unchanged as unchanged
from unbroken.checkpoint.elsewhere import environment_differences as environment_differences
from unbroken.checkpoint.environment import environment_facts as environment_facts
from unbroken.checkpoint.environment_rules import ENVIRONMENT_RULES as ENVIRONMENT_RULES
from unbroken.checkpoint.fingerprints import may_go_on as may_go_on
from unbroken.checkpoint.layout import Layout as Layout
from unbroken.checkpoint.policy import Cadence as Cadence
from unbroken.checkpoint.policy import Timer as Timer
from unbroken.checkpoint.preemption import EXIT_STOPPED as EXIT_STOPPED
from unbroken.checkpoint.preemption import Preemption as Preemption
from unbroken.checkpoint.preemption import TrainingStopped as TrainingStopped
from unbroken.checkpoint.readers import LoadFrom as LoadFrom
from unbroken.checkpoint.reading_ahead import ReadAhead as ReadAhead
from unbroken.checkpoint.reading_ahead import read_ahead as read_ahead
from unbroken.checkpoint.report import ResumeReport as ResumeReport
from unbroken.checkpoint.selection import ResumeFrom as ResumeFrom
from unbroken.checkpoint.selection import Selection as Selection
from unbroken.checkpoint.taking_effect import ratio as ratio

__all__ = [
    "ENVIRONMENT_RULES",
    "EXIT_STOPPED",
    "AsBuilt",
    "Cadence",
    "Checkpointer",
    "Comparison",
    "Difference",
    "ExactResume",
    "Examine",
    "Layout",
    "LoadFrom",
    "Policy",
    "Preemption",
    "ReadAhead",
    "ResumeFrom",
    "ResumeReport",
    "Rule",
    "SaveCost",
    "Selection",
    "SnapshotMode",
    "Timer",
    "TrainingStopped",
    "Verdict",
    "Word",
    "brief",
    "code_differences",
    "code_facts",
    "compare",
    "environment_differences",
    "environment_facts",
    "gravest_first",
    "may_go_on",
    "overall",
    "ratio",
    "read_ahead",
    "unchanged",
]
