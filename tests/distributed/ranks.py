"""Runs of several ranks on this machine: fresh processes with the environment that torchrun sets.

As under torchrun, the key-value store lives in the process that starts the ranks, so that no
port has to be guessed; `store_on_rank_0=True` puts it into rank 0, as other launchers do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from fresh import free_port, fresh_process

# A TCPStore looks up the name of each address that connects, 127.0.0.1 too; where the name server
# loses a packet, that takes 5 s, and the store answers nobody meanwhile. See resolv.conf(5).
_QUICK_NAMES = {"RES_OPTIONS": "timeout:1 attempts:1"}


def run_ranks(
    function: Callable[..., object],
    *arguments: Any,
    world_size: int = 2,
    of_rank: Sequence[Any] | None = None,
    never_end: Sequence[int] = (),
    store_on_rank_0: bool = False,
    restart: int = 0,
    timeout: float = 60.0,
) -> list[int]:
    """Run a function on all ranks, each in a fresh process; return their exit codes, by rank.

    `of_rank[rank]`, if given, is its first argument. -9 is the exit code of a rank that was
    killed, by itself or here: those of `never_end` when all others have ended, and all that
    are left after `timeout` seconds.
    """
    with _store(store_on_rank_0) as port:
        processes = [
            fresh_process(
                _be_a_rank,
                _environment(rank, world_size, port, store_on_rank_0, restart),
                function,
                *(() if of_rank is None else (of_rank[rank],)),
                *arguments,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait_for([p for rank, p in enumerate(processes) if rank not in never_end], timeout)
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


@contextlib.contextmanager
def _store(on_rank_0: bool) -> Iterator[int]:
    """Yield the port of the store, which is held here or free for rank 0."""
    if on_rank_0:
        yield free_port()
    else:
        from torch.distributed import TCPStore

        os.environ.update(_QUICK_NAMES)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        yield store.port


def _environment(
    rank: int, world_size: int, port: int, store_on_rank_0: bool, restart: int
) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(restart),
        "TORCHELASTIC_USE_AGENT_STORE": str(not store_on_rank_0),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1],  # the loopback
        **_QUICK_NAMES,
    }


def _be_a_rank(environment: dict[str, str], function: Callable[..., object], *arguments) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    function(*arguments)


def _wait_for(processes: list[BaseProcess], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    left = {process.sentinel for process in processes}
    while left and time.monotonic() < deadline:
        left -= set(wait(left, max(0.0, deadline - time.monotonic())))
