"""Real processes on a real disk, killed with SIGKILL at every step of every scenario."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from crash.faulty_runs import EACH_SCENARIO
from crash.oracle import check_after_cut
from crash.save_scenarios import SCENARIOS
from unbroken.storage import LocalStorage
from unbroken.store import RunDirectory

SCRIPT = Path(__file__).with_name("killed_children.py")


def killed_at_every_step(name: str, folder: Path) -> list[dict[str, object]]:
    command = [sys.executable, str(SCRIPT), name, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@EACH_SCENARIO
def test_after_any_sigkill_the_newest_checkpoint_is_the_old_or_the_new_one(scenario, tmp_path):
    name = next(name for name, item in SCENARIOS.items() if item is scenario)
    *killed, last = killed_at_every_step(name, tmp_path)
    assert last == {"code": 0, "saved": True}
    assert {outcome["code"] for outcome in killed} == {-signal.SIGKILL}
    assert len(killed) > 20
    for step, outcome in enumerate([*killed, last], 1):
        storage = LocalStorage(tmp_path / str(step))
        check_after_cut(storage, scenario, may_be_new=True, must_be_new=outcome["saved"])


def test_the_next_start_tells_who_was_killed(tmp_path):
    killed_at_every_step("a save over an older one", tmp_path)
    with RunDirectory.open(tmp_path / "10", owner="the next") as run:
        assert run.previous_owner == "test"
