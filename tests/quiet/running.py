"""Runs programs in fresh processes, to a kill and after it, and tells what they said."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from distributed.ranks import run_ranks
from fresh import run_fresh
from quiet.programs import PRELUDE
from unbroken.errors import UnbrokenError

Way = Callable[[str, str, int], list[int]]
"""Starts a script in a run directory, to be killed at a step; returns the status of each rank."""


def start(script: str, folder: str, kill_at: int) -> None:
    """Run a script as its user would; write how it ended to a file beside it, on each rank."""
    import torch._dynamo  # noqa: F401  (each optimizer imports it)

    left = left_beside(script, os.environ.get("RANK", ""))
    output = os.open(f"{left}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    sys.argv = [script, folder, str(kill_at)]
    try:
        found = told(runpy.run_path(script, run_name="__main__"))
    except UnbrokenError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.flush()
    new = Path(f"{left}.new")
    new.write_text(json.dumps(found))
    new.replace(f"{left}.json")  # it may be killed at any moment
    os._exit(0)


def start_by(order: dict) -> None:
    """The same, in a process that has loaded the host."""
    import torch

    torch.set_num_threads(1)
    start(order["script"], order["run"], order["kill_at"])


def left_beside(script: str, rank: str = "") -> Path:
    return Path(script).with_suffix(f".of{rank}")


def told(names: dict) -> dict:
    report = names["report"]
    return {
        "digest": digest_of([names["model"], *names["also"]]),
        "verdict": report.verdict,
        "step": report.step,
        "differences": [str(one) for one in report.differences],
        "notes": list(report.notes),
    }


def digest_of(modules: list) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def alone(script: str, folder: str, kill_at: int) -> list[int]:
    return [run_fresh(start, script, folder, kill_at)]


def on_two_ranks(script: str, folder: str, kill_at: int) -> list[int]:
    return run_ranks(start, script, folder, kill_at)


def run(
    text: str,
    folder: Path,
    kill_at: int = -1,
    name: str = "train.py",
    how: Way = alone,
) -> dict:
    """Run a program with this text; return what its first rank left, and the lines of all."""
    script = folder / name
    script.write_text(PRELUDE + text)
    for left in folder.glob("*.json"):
        left.unlink()
    statuses = how(str(script), str(folder / "run"), kill_at)
    ranks = [""] if len(statuses) == 1 else [str(rank) for rank in range(len(statuses))]
    left = [left_beside(str(script), rank) for rank in ranks]
    texts = [Path(f"{one}.txt").read_text() for one in left]
    results = [Path(f"{one}.json") for one in left]
    found = json.loads(results[0].read_text()) if results[0].exists() else {}
    status = statuses[0] if len({*statuses}) == 1 else statuses
    return {"status": status, "output": "".join(texts), **found}


KILLED_AT, SAVED_AT = 10, 8
SAID_AT_EACH_RESUME = (
    *("resuming from", "took over from a process that died", "step "),
    *("DataLoader: reading and skipping", "skipped "),  # what it costs to read an epoch again
    *("Together: reading and skipping", "Ahead: reading and skipping"),
)

REPEATED = re.compile(r"steps? .*repeated with the same bits")
"""What a resume tells of the steps that the killed run had taken after its last save."""

OF_THE_MACHINE = re.compile(r"_runtime'|it/s]|\[c10d\]")
"""What tells of speed, or of a connection between ranks that a loaded machine was slow to make."""


def resumes_exactly(program: str, folder: Path, how: Way = alone) -> None:
    """Assert that a program that was killed and started again is the same, and says nothing."""
    for name in ("whole", "killed"):
        (folder / name).mkdir(exist_ok=True)
    whole = run(program, folder / "whole", how=how)
    assert "digest" in whole, whole
    killed = run(program, folder / "killed", KILLED_AT, how=how)
    assert killed["status"] == -signal.SIGKILL, killed["output"]
    resumed = run(program, folder / "killed", how=how)
    assert resumed.get("verdict") == "exact", resumed
    assert resumed["step"] == SAVED_AT, resumed
    assert resumed["differences"] == [], resumed
    assert [one for one in resumed["notes"] if not REPEATED.fullmatch(one)] == [], resumed
    assert resumed["digest"] == whole["digest"], resumed
    repeated, *others = new_lines(resumed["output"], whole["output"], folder)
    assert REPEATED.fullmatch(repeated), resumed
    assert others == [], resumed


def new_lines(after: str, before: str, folder: Path) -> list[str]:
    """Return what a resumed run says that one without a kill does not, the machine aside."""
    known = before.replace(str(folder / "whole"), str(folder / "killed")).splitlines()
    lines = (line for line in after.splitlines() if line.strip() and line not in known)
    told = (
        line.removeprefix("[transformers] ") for line in lines if not OF_THE_MACHINE.search(line)
    )
    return [line for line in told if not line.startswith(SAID_AT_EACH_RESUME)]
