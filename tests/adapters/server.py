"""A process that has loaded transformers and forks for each order: 0.1 s in place of 8 s."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
SECONDS = 240  # of one order; less than the limit of a test


def serve() -> None:
    sys.path.insert(0, str(TESTS))
    import torch._dynamo  # noqa: F401  (each optimizer imports it)

    import unbroken.adapters.transformers  # noqa: F401
    from adapters import runs, seeds
    from quiet import running

    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            signal.alarm(order.setdefault("seconds", SECONDS))
            obey({"runs": runs, "seeds": seeds, "running": running}, order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def obey(modules: dict[str, Any], order: dict) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(order["folder"])
    status = 1
    try:
        getattr(modules[order.get("module", "runs")], order.get("action", "train"))(order)
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Server:
    """The side of the tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, order: dict) -> int:
        """Return the status of the process that did it; a signal is a negative number."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


if __name__ == "__main__":
    serve()
