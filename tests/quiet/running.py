"""Runs programs in fresh processes, to a kill and after it, and tells what they said."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

from quiet.programs import PRELUDE
from scenarios import run_fresh
from unbroken.errors import UnbrokenError


def start(script: str, folder: str, kill_at: int) -> None:
    """Run a script as its user would; write how it ended to a file beside it."""
    import torch._dynamo  # noqa: F401  (each optimizer imports it)

    output = os.open(f"{script}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    sys.argv = [script, folder, str(kill_at)]
    try:
        found = told(runpy.run_path(script, run_name="__main__"))
    except UnbrokenError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.flush()
    Path(script).with_suffix(".json").write_text(json.dumps(found))
    os._exit(0)


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


def run(text: str, folder: Path, kill_at: int = -1, name: str = "train.py") -> dict:
    """Run a program with this text; return what it left, and its lines."""
    script = folder / name
    script.write_text(PRELUDE + text)
    script.with_suffix(".json").unlink(missing_ok=True)
    status = run_fresh(start, str(script), str(folder / "run"), kill_at)
    left = script.with_suffix(".json")
    found = json.loads(left.read_text()) if left.exists() else {}
    output = Path(f"{script}.txt").read_text()
    return {"status": status, "output": output, **found}
