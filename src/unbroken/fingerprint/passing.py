"""Values that pass: paths, marks of time and places, which say nothing of a training."""

from __future__ import annotations

import os
import re
import time

OWN_TO_A_START = frozenset({
    "training", "gradient_checkpointing", "name_or_path", "_name_or_path", "architectures",
    "transformers_version", "torch_dtype", "dtype", "device", "warnings_issued",
    "_is_torch_compile", "_compiled_call_impl",
})  # fmt: skip
"""Attributes that may be others at each start, or that the environment tells."""

_DAY = 86400.0
_LONG = 64
_PASSING = re.compile(
    r"\d{4}-\d\d-\d\d|20\d{6}[-_T]?\d{4}|[0-9a-f]{16}|[0-9a-f]{8}-[0-9a-f]{4}-"
    r"|^(cpu|cuda|mps|xpu)(:\d+)?$| at 0x",
    re.IGNORECASE,
)


def is_passing_text(text: str) -> bool:
    """Return whether a text looks like a path, a date, a random name or a device."""
    return len(text) > _LONG or os.sep in text or _PASSING.search(text) is not None


def is_passing_number(number: float) -> bool:
    """Return whether a number is the time of this start, in seconds, milli- or nanoseconds."""
    now = time.time()
    return any(abs(number / unit - now) < _DAY for unit in (1, 1e3, 1e6, 1e9))
