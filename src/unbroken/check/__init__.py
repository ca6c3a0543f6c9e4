"""Proving, from outside, whether any training script resumes exactly."""

from __future__ import annotations

from unbroken.check.prove import CheckRequest as CheckRequest
from unbroken.check.prove import CheckResult as CheckResult
from unbroken.check.prove import check_script as check_script
from unbroken.check.verdict import Culprit as Culprit
from unbroken.check.verdict import Status as Status
from unbroken.check.verdict import Verdict as Verdict

__all__ = ["CheckRequest", "CheckResult", "Culprit", "Status", "Verdict", "check_script"]
