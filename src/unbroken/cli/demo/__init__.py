"""`unbroken demo`: a run that is killed again and again against one that is not."""

from __future__ import annotations

from unbroken.cli.demo.demo import tell as tell

__all__ = ["tell"]
