"""Fresh processes: forks of one that has loaded torch and in which nothing more has happened.

As fresh as a new interpreter for all that training can see, at a hundredth of the cost.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_FRESH = multiprocessing.get_context("forkserver")
_FRESH.set_forkserver_preload(["fresh_modules"])


def fresh_process(function: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Return a fresh process that will call a function, when it is started."""
    _begin()
    return _FRESH.Process(target=function, args=arguments)


@functools.cache
def _begin() -> None:
    """Start the process that forks; it finds the tests' modules by its path alone."""
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    os.environ |= {"PYTHONPATH": path, "PYTHONPATH_OF_FRESH": before}
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH_OF_FRESH"]
        os.environ["PYTHONPATH"] = before
        if not before:
            del os.environ["PYTHONPATH"]


def run_fresh(function: Callable[..., object], *arguments: Any) -> int:
    """Run a function in a fresh process; return its exit code (-9: killed)."""
    process = fresh_process(function, *arguments)
    process.start()
    process.join()
    return process.exitcode


def free_port() -> int:
    """Return a port that nobody uses, below those that the system gives to whoever asks for any.

    One of those may be given to another test before it is used here.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
