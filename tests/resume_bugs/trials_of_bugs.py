"""What the check says of a broken script, and of its twin."""

from __future__ import annotations

from pathlib import Path

from check.recorded_scripts import ScriptServer
from check.trials import Trials
from resume_bugs.corpus import Bug
from unbroken.check import Verdict


def verdicts(bug: Bug, folder: Path, server: ScriptServer) -> dict[str, Verdict]:
    """Return the verdicts for the broken script and for its twin."""
    found = {}
    for name, text in (("broken", bug.script()), ("repaired", bug.twin())):
        place = folder / name
        place.mkdir()
        script = place / f"{bug.name}.py"
        script.write_text(text)
        trials = Trials(place, str(script), bug.kill_after, server)
        found[name] = trials.verdict()
    return found
