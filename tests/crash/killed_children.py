"""Run a scenario in forked children, each killed with SIGKILL at the next step.

    python killed_children.py SCENARIO FOLDER

Copies FOLDER/prepared to FOLDER/1, FOLDER/2, ..., runs the scenario in each, and prints how
each child ended and whether its save had returned, as JSON. Imports no torch: forking a
process with threads in it is not safe.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash.save_scenarios import SCENARIOS, Scenario
from unbroken.storage import LocalStorage
from unbroken.testing import KillingStorage


def run_child(scenario: Scenario, root: Path, kill_at: int) -> tuple[int, bool]:
    """Return the exit code of a child (minus the signal), and whether its save returned."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        scenario.act(KillingStorage(root, kill_at=kill_at), lambda: os.write(tell, b"saved"))
        os._exit(0)
    os.close(tell)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(told, "rb") as pipe:
        return code, pipe.read() == b"saved"


def main(name: str, folder: Path) -> None:
    scenario = SCENARIOS[name]
    scenario.prepare(LocalStorage(folder / "prepared"))
    outcomes = []
    for step in count(1):
        shutil.copytree(folder / "prepared", folder / str(step))
        code, saved = run_child(scenario, folder / str(step), step)
        outcomes.append({"code": code, "saved": saved})
        if code != -signal.SIGKILL:
            break
    assert "torch" not in sys.modules
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
