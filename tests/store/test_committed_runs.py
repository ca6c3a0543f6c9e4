"""Runs of every version of the format, made when it was new, stay readable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from committed_runs.make import contents, trainer
from unbroken.store import CheckpointReader, RunDirectory
from unbroken.store.format.manifest import VERSION

RUNS = Path(__file__).parent.parent / "committed_runs"
FORMATS = sorted(RUNS.glob("format-*"))


@pytest.fixture(params=FORMATS, ids=lambda path: path.name)
def old(request, tmp_path):
    shutil.copytree(request.param, tmp_path / "old")
    return tmp_path / "old"


def test_there_is_a_run_of_each_version():
    assert [path.name for path in FORMATS] == [f"format-{n + 1}" for n in range(VERSION)]


def test_every_byte_of_an_old_run_is_verified(old):
    for place in (old / "run", old / "run" / "branches" / "longer"):
        run = RunDirectory.open_readonly(place)
        folders = [folder for _, folder in run.catalog.folders()]
        assert folders
        assert [CheckpointReader(run.storage, folder).verify() for folder in folders] == [[], []]


def test_an_old_run_goes_on_where_it_was(old):
    again = trainer(old / "run")
    assert again.load_checkpoint().step == 4
    assert contents(again) == json.loads((old / "contents.json").read_text())
    again.checkpointer.close()
    assert trainer(old / "run").train().progress.step == 6


def test_an_old_branch_goes_on_where_it_was(old):
    branch = trainer(old / "run", branch="longer", resume_from_checkpoint=2)
    assert branch.load_checkpoint().step == 3
    branch.checkpointer.close()
