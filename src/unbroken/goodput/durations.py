"""Durations as people read them."""

from __future__ import annotations


def seconds_text(seconds: float) -> str:
    """Return a duration for people.

    Example:
        >>> seconds_text(0.5), seconds_text(58), seconds_text(421), seconds_text(11124)
        ('0.50 s', '58 s', '7.0 min', '3.1 h')
    """
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
