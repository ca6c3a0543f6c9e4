"""The command line: `unbroken train | demo | check | ls | show | verify | diff | doctor`."""

from __future__ import annotations

__all__: list[str] = []
