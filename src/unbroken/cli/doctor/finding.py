"""One thing that the doctor has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["breaks", "risk", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that the doctor has found, and what to do about it.

    Attributes:
        severity: "breaks": the same run would not have the same bits here, or would be lost;
            "risk": it would in some circumstances, which `why` names; "note": good to know.
        what: What was found.
        why: Why it matters.
        remedy: What to do about it.
    """

    severity: Severity
    what: str
    why: str
    remedy: str


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Return the findings by severity; equal ones stay as they come.

    Example:
        >>> found = [Finding("note", "a", "", ""), Finding("breaks", "b", "", "")]
        >>> [finding.what for finding in by_severity(found)]
        ['b', 'a']
    """
    order = ("breaks", "risk", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))
