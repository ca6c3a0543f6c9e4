"""Scripts that run in a fork of a server, with the recorder in them.

The recorder enters by the same function as in reality, after torch is there instead of with it.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from fork_server import ForkServer

ENTRY = Path(__file__).parents[2] / "src/unbroken/check/entry"


def run_recorded(order: dict) -> None:
    sys.argv = order["words"]
    if order["plan"] is not None:
        sys.path.insert(0, str(ENTRY))
        os.environ["UNBROKEN_CHECK_PLAN"] = order["plan"]
        import sitecustomize  # noqa: F401  (the recorder's)

    runpy.run_path(sys.argv[0], run_name="__main__")


class ScriptServer(ForkServer):
    """Runs scripts; what they would load first may be loaded before."""

    def __init__(self, *modules: str, path: tuple[str | Path, ...] = ()) -> None:
        super().__init__(__name__, *modules, path=path)

    def run_script(
        self, words: list[str], folder: Path, plan: Path | None, log: Path
    ) -> tuple[int, float]:
        """Run a script to its end; return its status and the seconds that it took.

        Without a plan there is no recorder in it.
        """
        began = time.monotonic()
        order = {"module": __name__, "action": run_recorded.__name__, "words": words}
        paths = {"folder": str(folder), "plan": plan and str(plan), "log": str(log)}
        return self.run({**order, **paths}), time.monotonic() - began
