"""Saving and resuming a run: which objects, when, from what, and until which signal."""

from unbroken.changes.apply import InitialHyperparameters as InitialHyperparameters
from unbroken.changes.compare import Comparison as Comparison
from unbroken.changes.compare import DifferenceFilter as DifferenceFilter
from unbroken.changes.compare import ResumePolicy as ResumePolicy
from unbroken.changes.compare import code_differences as code_differences
from unbroken.changes.compare import environment_differences as environment_differences
from unbroken.changes.differences import Difference as Difference
from unbroken.changes.differences import ExactResume as ExactResume
from unbroken.changes.differences import ResumeReport as ResumeReport
from unbroken.changes.differences import Rule as Rule
from unbroken.changes.differences import Verdict as Verdict
from unbroken.changes.differences import Word as Word
from unbroken.changes.differences import brief as brief
from unbroken.changes.differences import by_severity as by_severity
from unbroken.changes.differences import compare as compare
from unbroken.changes.differences import overall as overall
from unbroken.changes.differences import unchanged as unchanged
from unbroken.changes.rules import ENVIRONMENT_RULES as ENVIRONMENT_RULES
from unbroken.changes.rules import may_go_on as may_go_on
from unbroken.checkpoint.arguments import Clock as Clock
from unbroken.checkpoint.arguments import RankPolicy as RankPolicy
from unbroken.checkpoint.arguments import RunFacts as RunFacts
from unbroken.checkpoint.cadence import Cadence as Cadence
from unbroken.checkpoint.cadence import SavePolicy as SavePolicy
from unbroken.checkpoint.cadence import Timer as Timer
from unbroken.checkpoint.checkpointer import Checkpointer as Checkpointer
from unbroken.checkpoint.preemption import EXIT_STOPPED as EXIT_STOPPED
from unbroken.checkpoint.preemption import Preemption as Preemption
from unbroken.checkpoint.preemption import TrainingStopped as TrainingStopped
from unbroken.checkpoint.preemption import agreed_reason as agreed_reason
from unbroken.checkpoint.resume.readers import ReadAhead as ReadAhead
from unbroken.checkpoint.resume.readers import ReadFrom as ReadFrom
from unbroken.checkpoint.resume.selection import Candidate as Candidate
from unbroken.checkpoint.resume.selection import ResumeChoice as ResumeChoice
from unbroken.checkpoint.resume.selection import ResumeFrom as ResumeFrom
from unbroken.checkpoint.resume.selection import origin_of as origin_of
from unbroken.checkpoint.resume.selection import read_ahead as read_ahead
from unbroken.checkpoint.save.async_saver import SaveCost as SaveCost
from unbroken.checkpoint.save.async_saver import SaveMode as SaveMode
from unbroken.checkpoint.save.session import Layout as Layout
from unbroken.fingerprint.environment import code_facts as code_facts
from unbroken.fingerprint.environment import environment_facts as environment_facts

__all__ = [
    "ENVIRONMENT_RULES",
    "EXIT_STOPPED",
    "Cadence",
    "Candidate",
    "Checkpointer",
    "Clock",
    "Comparison",
    "Difference",
    "DifferenceFilter",
    "ExactResume",
    "InitialHyperparameters",
    "Layout",
    "Preemption",
    "RankPolicy",
    "ReadAhead",
    "ReadFrom",
    "ResumeChoice",
    "ResumeFrom",
    "ResumePolicy",
    "ResumeReport",
    "Rule",
    "RunFacts",
    "SaveCost",
    "SaveMode",
    "SavePolicy",
    "Timer",
    "TrainingStopped",
    "Verdict",
    "Word",
    "agreed_reason",
    "brief",
    "by_severity",
    "code_differences",
    "code_facts",
    "compare",
    "environment_differences",
    "environment_facts",
    "may_go_on",
    "origin_of",
    "overall",
    "read_ahead",
    "unchanged",
]
