"""The end of a loader's worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def shut_down(batches: Iterator[Any]) -> None:
    """End the workers behind a torch `DataLoader`'s iterator now; do nothing to others.

    Torch does it when the iterator is collected. After an error in a worker the iterator stands
    in a reference cycle, and its end then takes 5 seconds for each worker (torch 2.13).

    Args:
        batches: What `iter(loader)` gave.

    Example:
        >>> shut_down(iter([1, 2]))
    """
    end_workers = getattr(batches, "_shutdown_workers", None)
    if end_workers is not None:
        end_workers()
