"""A process that has loaded torch and forks for each script: 0.1 s in place of 2 s for a start.

The recorder enters by the same function as in reality, after torch is there instead of with it.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

ENTRY = Path(__file__).parents[2] / "src/unbroken/check/entry"
SECONDS = 240  # of one script; less than the limit of a test


def serve() -> None:
    import torch._dynamo  # noqa: F401  (each optimizer imports it)

    gc.freeze()  # what is loaded stays shared with the children
    sys.path.insert(0, str(ENTRY))
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(order: dict) -> None:
    output = os.open(order["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(order["folder"])
    os.environ["UNBROKEN_CHECK_PLAN"] = order["plan"]
    sys.argv = order["words"]
    status = 1
    try:
        import sitecustomize  # noqa: F401  (the recorder's)

        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        print(ended)
    finally:
        sys.stdout.flush()
        os._exit(status)


class ForkServer:
    """The side of the tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.pid = self._process.pid

    def run(self, words: list[str], folder: Path, plan: Path, log: Path) -> tuple[int, float]:
        """Run a script to its end; return its status and the seconds that it took."""
        began = time.monotonic()
        order = {"words": words, "folder": str(folder), "plan": str(plan), "log": str(log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), time.monotonic() - began

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


if __name__ == "__main__":
    serve()
