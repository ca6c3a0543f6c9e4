"""The four flows of docs/architecture.md run through the functions that it names, in that order."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path

import pytest
import torch

import unbroken
from small_trainers import small_trainer
from unbroken import DifferenceError

ROOT = Path(__file__).parent.parent
SOURCE = Path(unbroken.__file__).parent
PAGE = (ROOT / "docs/architecture.md").read_text()
FLOWS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def functions_of(flow: str) -> list[str]:
    return re.findall(r"`(\w[\w/]*\.py:\w[\w.]*)`", FLOWS[flow])


class Trace:
    """The functions of the package that were entered, each when it was first."""

    def __init__(self) -> None:
        self.entered: dict[str, None] = {}

    def __enter__(self):
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(SOURCE):
            self.entered[f"{path.relative_to(SOURCE)}:{frame.f_code.co_qualname}"] = None


def save(folder):
    trainer = small_trainer(folder)
    trainer.train()
    with Trace() as trace:
        trainer.save_checkpoint()
    return trace


def resume(folder):
    small_trainer(folder).train()
    with Trace() as trace:
        small_trainer(folder).train()
    return trace


def sample(folder):
    with Trace() as trace:
        small_trainer(folder).train()
    return trace


def change(folder):
    small_trainer(folder).train()
    with Trace() as trace, pytest.raises(DifferenceError):
        small_trainer(folder, learning_rate=0.5).train()
    return trace


@pytest.mark.parametrize("flow", [save, resume, sample, change])
def test_a_flow_runs_through_the_functions_that_the_page_names(flow, tmp_path):
    torch.manual_seed(0)
    named, entered = functions_of(flow.__name__), list(flow(tmp_path).entered)
    assert 8 <= len(named) <= 12
    assert set(named) <= set(entered)
    assert named == sorted(named, key=entered.index)


def test_the_page_has_a_line_for_each_folder():
    folders = {path.parent.relative_to(SOURCE) for path in SOURCE.rglob("*.py")}
    named = {Path(name) for name in re.findall(r"^\| `([\w/]+)/` \|", PAGE, re.MULTILINE)}
    assert {folder for folder in folders if folder.parts} == named
