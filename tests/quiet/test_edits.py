"""Fifty edits of a script that change nothing pass; fifty that change the training are refused."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from quiet.edits import HARMFUL, HARMLESS, LOOP_EDITS, SCRIPT
from quiet.programs import PROGRAMS
from quiet.running import run


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run of the script that was killed after its eighth step was saved."""
    folder = tmp_path_factory.mktemp("killed")
    assert run(SCRIPT, folder, 10)["status"] == -signal.SIGKILL
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    return run(SCRIPT, tmp_path_factory.mktemp("whole"))


def again(killed: Path, folder: Path, edit: tuple[str, str] = ("", "")) -> dict:
    """Start the script again, edited."""
    old, new = edit
    assert not old or SCRIPT.count(old) == 1, f"{old!r} stands there {SCRIPT.count(old)} times"
    shutil.copytree(killed / "run", folder / "run")
    return run(SCRIPT.replace(old, new) if old else SCRIPT, folder)


def test_without_an_edit_it_is_exact_and_has_the_same_bits(killed, whole, tmp_path):
    found = again(killed, tmp_path)
    assert (found["verdict"], not_harmless(found)) == ("exact", [])
    assert found["digest"] == whole["digest"]


def not_harmless(found: dict) -> list[str]:
    """Return the differences that matter; that the text of a script is another one, always told."""
    told = [line for line in found["differences"] if ": harmless: " not in line]
    return [line for line in told if not line.startswith("code.script_digest")]


@pytest.mark.parametrize("edit", HARMLESS.values(), ids=HARMLESS)
def test_an_edit_that_changes_nothing_passes(edit, killed, tmp_path, whole):
    found = again(killed, tmp_path, edit)
    assert found.get("step") == 8, found
    assert not_harmless(found) == []
    if "max_steps" not in edit[1]:
        assert found["digest"] == whole["digest"]


@pytest.mark.parametrize("edit", HARMFUL.values(), ids=HARMFUL)
def test_an_edit_that_changes_the_training_is_refused_before_the_first_step(edit, killed, tmp_path):
    found = again(killed, tmp_path, edit)
    assert found.get("error") in ("DifferenceError", "StateMismatchError", "DataError"), found
    assert not (tmp_path / "run" / "checkpoint-12").exists()


LOOP = PROGRAMS["clipped gradients and smoothed labels"]


@pytest.fixture(scope="module")
def killed_loop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    assert run(LOOP, folder, 10)["status"] == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("edit", LOOP_EDITS.values(), ids=LOOP_EDITS)
def test_an_edit_of_ones_own_loop_is_never_called_exact(edit, killed_loop, tmp_path):
    shutil.copytree(killed_loop / "run", tmp_path / "run")
    assert LOOP.count(edit[0]) == 1
    found = run(LOOP.replace(*edit), tmp_path)
    assert found["verdict"] != "exact", found["differences"]
    assert any(line.startswith("code.script_digest") for line in found["differences"])


def test_fifty_edits_of_each_kind_are_tried():
    assert len(HARMLESS) >= 50
    assert len(HARMFUL) >= 50
