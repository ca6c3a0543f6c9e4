"""Scripts with one bug of resuming each are condemned by its name, and their twins pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from resume_bugs.corpus import Bug
from resume_bugs.data_bugs import DATA_BUGS
from resume_bugs.state_bugs import STATE_BUGS
from resume_bugs.trials_of_bugs import verdicts
from unbroken.check import Status

BUGS = {bug.name: bug for bug in (*STATE_BUGS, *DATA_BUGS)}
IN_CI = (
    "average_only_at_first",
    "gradients_left_over",
    "parameters_in_another_order",
    "rest_of_another_epoch",
    "scheduler_not_loaded",
    "train_forgotten",
    "window_lost",
    "worker_seeds_differ",
)
TABLE = Path(__file__).parents[2] / "docs/resume-bugs.md"


def is_judged_rightly(bug: Bug, folder, server) -> None:
    found = verdicts(bug, folder, server)
    broken, repaired = found["broken"], found["repaired"]
    assert broken.status is Status.NOT_EXACT, broken
    assert broken.culprit in bug.culprits, broken
    assert repaired.status is Status.EXACT, (repaired, repaired.evidence)


@pytest.mark.parametrize("name", IN_CI)
def test_a_bug_is_named_and_its_repair_is_exact(name, tmp_path, server):
    is_judged_rightly(BUGS[name], tmp_path, server)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in BUGS if name not in IN_CI])
def test_every_bug_is_named_and_its_repair_is_exact(name, tmp_path, server):
    is_judged_rightly(BUGS[name], tmp_path, server)


def test_each_script_differs_from_its_twin_and_from_all_others():
    texts = [text for bug in BUGS.values() for text in (bug.script(), bug.twin())]
    assert len(BUGS) == len(STATE_BUGS) + len(DATA_BUGS) >= 40
    assert len({bug.script() for bug in BUGS.values()}) == len(BUGS)
    assert all(bug.script() != bug.twin() for bug in BUGS.values())
    for text in texts:
        compile(text, "a script", "exec")


def test_the_table_in_the_documents_is_that_of_the_corpus():
    rows = [
        f"| `{bug.name}` | {bug.what} | {' or '.join(f'`{one}`' for one in bug.culprits)} |"
        for bug in BUGS.values()
    ]
    told = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    assert told == rows
