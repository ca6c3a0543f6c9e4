"""Proving, from outside, whether any training script resumes exactly."""

from __future__ import annotations

from unbroken.check.verdict import Culprit as Culprit
from unbroken.check.verdict import Status as Status
from unbroken.check.verdict import Verdict as Verdict

__all__ = ["Culprit", "Status", "Verdict"]
