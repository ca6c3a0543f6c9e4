"""A process that has loaded a host, and forks for each order: 0.1 s in place of 2 to 8 s.

For what needs another host than `fresh`, another output, or its words as a user gives them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

SECONDS = 240  # of one order; less than the limit of a test


def serve(modules: Sequence[str]) -> None:
    import torch._dynamo  # noqa: F401  (each optimizer imports it)

    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # what is loaded stays shared with the children
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(order.setdefault("seconds", SECONDS))
            obey(order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def obey(order: dict) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(order["folder"])
    status = 1
    try:
        getattr(sys.modules[order["module"]], order["action"])(order)
        status = 0
    except SystemExit as ended:
        status = status_of(ended.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(code: object) -> int:
    """Return the status that a SystemExit ends an interpreter with; print what it says."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


class ForkServer:
    """The side of the tests.

    Args:
        modules: Loaded before it forks; an order names one of them, and a function of it.
        path: Folders in which modules are found, too.
    """

    def __init__(self, *modules: str, path: Sequence[str | Path] = ()) -> None:
        folders = [*map(str, path), os.environ.get("PYTHONPATH", "")]
        found_in = {"PYTHONPATH": os.pathsep.join(filter(None, folders))} if path else {}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **found_in},
        )
        self.pid = self._process.pid

    def run(self, order: dict) -> int:
        """Return the status of the process that did it; a signal is a negative number."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it; what tests have forked may hold its pipe open, so that it never reads the end."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


if __name__ == "__main__":
    serve(sys.argv[1:])
