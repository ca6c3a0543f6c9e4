"""Scripts of users, edited between two starts, each start in a fresh process."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import sys
from pathlib import Path

from fresh import run_fresh
from unbroken.errors import UnbrokenError

SCRIPTS = Path(__file__).parent / "scripts"
KILLED_AT = 5  # after checkpoint-4


def start(script: str, folder: str, kill_at: int, allow: str, skip: str) -> None:
    """Run a script as its user would; write what it found to result.json beside it."""
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    sys.argv = [script, folder, str(kill_at), allow, skip]
    try:
        report = runpy.run_path(script, run_name="__main__")["report"]
    except UnbrokenError as error:
        found = {"error": type(error).__name__, "message": "\n".join([str(error), *_notes(error)])}
    else:
        rows = {d.path: [d.verdict, d.effect] for d in report.differences}
        found = {"differences": rows, "verdict": report.verdict, "step": report.step}
    Path(script).with_suffix(".json").write_text(json.dumps(found))


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def started(text: str, folder: Path, *, kill_at: int = -1, allow: str = "", skip: str = "") -> dict:
    """Start a script with this text in a fresh process; return what it found."""
    script = folder / "train.py"
    script.write_text(text)
    run_fresh(start, str(script), str(folder / "run"), kill_at, allow, skip)
    found = script.with_suffix(".json")
    return json.loads(found.read_text()) if found.exists() else {}


def edited(name: str, *edits: tuple[str, str]) -> str:
    """Return the text of a script with some of it replaced; each text stands there once."""
    text = (SCRIPTS / f"{name}.py").read_text()
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{name}: {old!r} stands there {text.count(old)} times")
        text = text.replace(old, new)
    return text
