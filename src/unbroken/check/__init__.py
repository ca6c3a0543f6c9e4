"""Proving, from outside, whether any training script resumes exactly."""

from __future__ import annotations

from unbroken.check.prove import Answer as Answer
from unbroken.check.prove import Question as Question
from unbroken.check.prove import prove as prove
from unbroken.check.verdict import Culprit as Culprit
from unbroken.check.verdict import Status as Status
from unbroken.check.verdict import Verdict as Verdict

__all__ = ["Answer", "Culprit", "Question", "Status", "Verdict", "prove"]
