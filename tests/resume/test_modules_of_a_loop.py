"""A module of the user's own that the loop alone calls is compared by its bytes, as the script is.

Nothing that a checkpoint holds reaches it: no object knows what the loop calls between two steps.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from quiet.programs import loop, trainer
from quiet.running import KILLED_AT, SAVED_AT, run

HELPERS = """import torch.nn.functional as F

def loss_of(model, inputs, labels):
    return F.cross_entropy(model(inputs), labels)
"""
IMPORT = "sys.path.insert(0, os.path.dirname(FOLDER))\nfrom {module} import loss_of"
FORWARD = "loss = loss_of(model, inputs, labels); loss.backward()"
CALLS = loop(before=IMPORT.format(module="helpers"), forward=FORWARD)
IN_A_PACKAGE = loop(before=IMPORT.format(module="mine.helpers"), forward=FORWARD)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def started_twice(program: str, folder: Path, before: dict, after: dict, **how) -> dict:
    """Kill a run of a program, put other files beside it, and start it again."""
    write(folder, before)
    killed = run(program, folder, KILLED_AT, **how)
    statuses = killed["status"] if isinstance(killed["status"], list) else [killed["status"]]
    assert -signal.SIGKILL in statuses, killed["output"]
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # two writes in one second
    write(folder, after)
    return run(program, folder, **how)


def lines(found: dict) -> list[str]:
    return [line.partition(":")[0] for line in found.get("differences", [found])]


OTHER = HELPERS.replace("return ", "return 0.5 * ")
PLACES = {
    "a module": (CALLS, "helpers", "helpers.py"),
    "a module of a package": (IN_A_PACKAGE, "mine.helpers", "mine/helpers.py"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_module_that_the_loop_alone_calls_is_never_called_exact(place, tmp_path):
    program, module, file = place
    found = started_twice(program, tmp_path, {file: HELPERS}, {file: OTHER})
    assert (found.get("step"), found.get("verdict")) == (SAVED_AT, "equivalent"), found
    assert lines(found) == [f"code.modules.{module}"], found
    assert f"equivalent: {module}: not the same file" in found["differences"][0]


def test_modules_that_nobody_edited_are_no_difference(tmp_path):
    found = started_twice(CALLS, tmp_path, {"helpers.py": HELPERS}, {"helpers.py": HELPERS})
    assert (found.get("verdict"), found["differences"]) == ("exact", []), found


def test_many_modules_are_one_line(tmp_path):
    names = [f"part{i}" for i in range(7)]
    files = {f"{name}.py": "" for name in names} | {"helpers.py": HELPERS}
    program = CALLS.replace("from helpers", f"import {', '.join(names)}\nfrom helpers")
    found = started_twice(program, tmp_path, files, {f"{name}.py": "one = 1" for name in names})
    assert lines(found) == ["code.modules"], found
    assert "part0, part1, part2, part3, part4 and 2 more: not the" in found["differences"][0]


def test_a_module_that_one_start_alone_has_loaded_is_no_difference(tmp_path):
    files = {"helpers.py": HELPERS, "seldom.py": "one = 1"}
    program = CALLS.replace("from helpers", "if KILL_AT > 0: import seldom\nfrom helpers")
    found = started_twice(program, tmp_path, files, {"seldom.py": "one = 2"})
    assert found["verdict"] == "exact", found


def test_a_module_that_a_class_in_a_trainer_comes_from_is_told_too(tmp_path):
    program = trainer(
        before="sys.path.insert(0, os.path.dirname(FOLDER))\nimport helpers",
        loss="lambda found, labels: F.cross_entropy(found, labels)",
        callbacks=", helpers.Speaks()",
    )
    before = "from unbroken import Callback\nclass Speaks(Callback):\n    pass\n"
    found = started_twice(
        program, tmp_path, {"helpers.py": before}, {"helpers.py": before + "ONE = 1\n"}
    )
    assert lines(found) == ["code.modules.helpers"], found
    assert found["verdict"] == "equivalent"
