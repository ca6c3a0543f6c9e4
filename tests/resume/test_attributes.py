"""Attributes that training changes come back, and what cannot come back is named."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

import keepers
from scenarios import run_fresh

HARM = {"by hand": keepers.loop, "with our Trainer": keepers.own}


def finished(run, folder: Path, *arguments) -> dict:
    assert run_fresh(run, str(folder), *arguments) == 0
    return json.loads(Path(f"{folder}.json").read_text())


@pytest.mark.parametrize("run", HARM.values(), ids=HARM)
def test_attributes_that_training_changes_come_back(run, tmp_path):
    whole = finished(run, tmp_path / "whole")
    for name in ("killed", "forgotten"):
        assert run_fresh(run, str(tmp_path / name), 4) == -signal.SIGKILL
    resumed = finished(run, tmp_path / "killed")
    assert resumed["seen"] == whole["seen"]
    assert [line.rpartition(": ")[2] for line in resumed["report"][:1]] == ["exact"]
    assert finished(run, tmp_path / "forgotten", 0, True)["seen"] != whole["seen"]


def test_a_setting_of_the_user_wins_over_what_training_made_of_the_old_one(tmp_path):
    assert run_fresh(keepers.own, str(tmp_path / "run"), 4) == -signal.SIGKILL
    assert run_fresh(keepers.own, str(tmp_path / "run"), 0, False, 0, 9) == 1
    allowed = finished(allowing_another_level, tmp_path / "run")
    assert "data.values.Curriculum.level: stored 0, now 9: changed" in "\n".join(allowed["report"])


def allowing_another_level(folder: str) -> None:
    keepers.own(folder, level=9, allow=["data"])
