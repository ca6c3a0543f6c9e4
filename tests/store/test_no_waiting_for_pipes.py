"""A named pipe in the place of a file of a run is refused or passed by, and never waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import nn

from time_limits import limited
from unbroken.checkpoint import Checkpointer
from unbroken.cli.main import main
from unbroken.errors import UnbrokenError

OF_THE_RUN = ("run.json", "run.lock", "history.jsonl", "metrics.jsonl")
OF_A_CHECKPOINT = ("manifest.json", "state.json", "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    with Checkpointer(tmp_path / "run", model=nn.Linear(2, 2)) as checkpointer:
        checkpointer.resume()
        for step in (1, 2):
            checkpointer.log({"step": step})
            checkpointer.save(step)
    return tmp_path / "run"


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def go_on(folder: Path) -> int:
    """Resume, log and save; return the step that was resumed."""
    with Checkpointer(folder, model=nn.Linear(2, 2)) as checkpointer:
        step = checkpointer.resume().step
        checkpointer.log({"step": step + 1})
        checkpointer.save(step + 1)
        return step


@pytest.mark.parametrize("name", OF_THE_RUN)
def test_a_pipe_in_the_place_of_a_file_of_the_run_is_not_waited_for(name, folder):
    make_pipe(folder / name)
    with limited(20, "going on beside a pipe"):
        try:
            assert go_on(folder) == 2
        except UnbrokenError as error:
            assert name in str(error)  # noqa: PT017 (going on is right, too)


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_a_pipe_in_the_place_of_a_file_of_a_checkpoint_is_damage(name, folder):
    make_pipe(folder / "checkpoint-2" / name)
    with limited(20, "going on beside a pipe"):
        assert go_on(folder) == 1


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
@pytest.mark.parametrize("name", [*OF_THE_RUN, *(f"checkpoint-2/{n}" for n in OF_A_CHECKPOINT)])
def test_looking_at_a_run_waits_for_no_pipe(command, name, folder, capsys):
    make_pipe(folder / name)
    with limited(20, "looking at a pipe"):
        main([command, str(folder)])
    assert "Traceback" not in capsys.readouterr().err
