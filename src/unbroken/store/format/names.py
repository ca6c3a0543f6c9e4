"""The names in a run directory and in a checkpoint folder."""

from __future__ import annotations

import re

RUN_NAME = "run.json"
NEW_RUN_NAME = "run.json.new"
LOCK_NAME = "run.lock"
HISTORY_NAME = "history.jsonl"
METRICS_NAME = "metrics.jsonl"
STAGING = ".staging"
TRASH = ".trash"
SET_ASIDE = "set-aside"
STEP_RECORDS = "step-records"
BRANCHES = "branches"

MANIFEST_NAME = "manifest.json"
STATE_FILE = "state.json"
PINNED_NAME = "pinned"

MAX_STEP = 10**18 - 1

_STEP = r"checkpoint-(0|[1-9][0-9]{0,17})"
_CHECKPOINT = re.compile(_STEP)
_NUMBERED = re.compile(_STEP + r"\.[1-9][0-9]{0,8}")
_REPLACED = re.compile(_STEP + r"\.replaced")
_OF_RANK = re.compile(r".*\.rank(0|[1-9][0-9]{0,8})\.[a-z]+")
# Flat, ASCII, visible, and no name that another file system would read differently.
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


_COPYING = re.compile(
    r"\.(" + _STEP + r"(\.([1-9][0-9]{0,8}|replaced))?|run\.json\.[1-9][0-9]{0,8})\.copying"
)


def copying_name(name: str) -> str:
    """Return what a folder or file is called while it is copied here from another device.

    Example:
        >>> copying_name("checkpoint-10")
        '.checkpoint-10.copying'
    """
    return f".{name}.copying"


def is_copying(name: str) -> bool:
    """Return whether a name is that of something which was being copied here."""
    return _COPYING.fullmatch(name) is not None


def checkpoint_name(step: int) -> str:
    """Return the folder name of a checkpoint.

    Example:
        >>> checkpoint_name(1200)
        'checkpoint-1200'
    """
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"step {step}: expected 0 to {MAX_STEP}")
    return f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """Return the step in a checkpoint's folder name, or None for any other name.

    Example:
        >>> step_of("checkpoint-1200"), step_of("checkpoint-007"), step_of("checkpoint-best")
        (1200, None, None)
    """
    return _step_in(_CHECKPOINT, name)


def step_of_numbered(name: str) -> int | None:
    """Return the step in "checkpoint-10.1": a staging attempt, or one in the trash or set aside."""
    return _step_in(_NUMBERED, name)


def step_of_replaced(name: str) -> int | None:
    """Return the step in "checkpoint-10.replaced": it counts until its successor is there."""
    return _step_in(_REPLACED, name)


def rank_of(name: str) -> int | None:
    """Return the rank that wrote a file of its own, or None for any other file.

    Example:
        >>> rank_of("model.rank2.safetensors"), rank_of("model.safetensors")
        (2, None)
    """
    return _step_in(_OF_RANK, name)


def file_of_rank(name: str, rank: int) -> str:
    """Return the file of a rank where several share one.

    Example:
        >>> file_of_rank("model.safetensors", 2)
        'model.rank2.safetensors'
    """
    stem, _, end = name.rpartition(".")
    return f"{stem}.rank{rank}.{end}"


def own_state_file(rank: int) -> str:
    """Return the file with what a rank other than 0 has of its own."""
    return file_of_rank(STATE_FILE, rank)


def own_key(rank: int) -> str:
    """Return the name under which that state stands: no object can have it."""
    return f"rank-{rank}"


def is_file_name(name: str) -> bool:
    """Return whether a manifest may list a file of this name.

    Example:
        >>> is_file_name("model.safetensors"), is_file_name("../x"), is_file_name("manifest.json")
        (True, False, False)
    """
    reserved = name.casefold() in (MANIFEST_NAME, PINNED_NAME)
    return _FILE.fullmatch(name) is not None and not reserved


def _step_in(pattern: re.Pattern[str], name: str) -> int | None:
    found = pattern.fullmatch(name)
    return None if found is None else int(found[1])
