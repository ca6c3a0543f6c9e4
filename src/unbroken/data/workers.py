"""The beginning and the end of a loader's worker processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader


def leave_signals_to_the_parent(worker: int, then: Callable[[int], None] | None = None) -> None:
    """Let a worker live on when its whole process group is asked to stop.

    Slurm, systemd and a terminal signal every process of a job. A worker that obeyed would take
    the batches away that the trainer needs to reach its next step edge, where it saves. The
    second SIGTERM is obeyed: it is what torch sends to a worker that does not end.

    Args:
        worker: The number of the worker, as torch gives it.
        then: A `worker_init_fn` to call besides.
    """
    signal.signal(signal.SIGTERM, _obey_the_next)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


def _obey_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def leave_signals_of(loader: Any) -> None:
    """Let the workers of a user's torch `DataLoader` leave signals to their parent."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return
    own = loader.worker_init_fn
    if not isinstance(own, partial) or own.func is not leave_signals_to_the_parent:
        loader.worker_init_fn = partial(leave_signals_to_the_parent, then=own)


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
