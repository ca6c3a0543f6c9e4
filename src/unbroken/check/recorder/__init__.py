"""The recorder: sits in a training process, sees every optimizer step, and changes nothing.

It is a package of its own: it imports nothing of `unbroken` (only its own files, by relative
names), so that it can be loaded by path into any interpreter that has torch. What it needs
stands in a plan (`plan.py`); what it sees goes to one file of JSON lines for each process
(`journal.py`).
"""

from __future__ import annotations

from .import_hook import after_import
from .protocol import RecordPlan


def enter(path: str) -> None:
    """Wait in this process until torch is imported, then record as the plan at `path` says."""

    def attach() -> None:
        from .recorder import Recorder

        Recorder(RecordPlan.read(path)).attach()

    after_import("torch", attach)


__all__ = ["enter"]
