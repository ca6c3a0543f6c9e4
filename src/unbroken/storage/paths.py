"""The one rule for paths inside a storage."""

from __future__ import annotations


def check_path(path: str) -> str:
    """Return `path` if it stays inside the root of a storage.

    Args:
        path: Relative, with "/" between the parts; "" is the root.

    Raises:
        ValueError: It is absolute, or a part of it is empty, "." or "..".

    Example:
        >>> check_path("checkpoint-10/model.safetensors")
        'checkpoint-10/model.safetensors'
    """
    if path and any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
        raise ValueError(f"{path!r}: is not a path inside the storage")
    return path


def parent_of(path: str) -> str:
    """Return the folder that holds `path`; the root holds what has no "/".

    Example:
        >>> parent_of("checkpoint-10/model.safetensors"), parent_of("run.json")
        ('checkpoint-10', '')
    """
    return path.rpartition("/")[0]
