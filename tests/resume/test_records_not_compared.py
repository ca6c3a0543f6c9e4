"""Records of data are compared also where CUDA has begun; where they cannot be, a line says so."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from fresh import run_fresh
from small_trainers import small_trainer
from unbroken.errors import UnbrokenError


class Points(Dataset):
    """Forty points; as `kind` says they stand on a device, or cannot be read at all."""

    def __init__(self, kind: str, salt: float) -> None:
        self.kind, self.home = kind, str(os.getpid())
        self.x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) + salt
        if kind == "cuda":
            self.x = self.x.cuda()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        if self.kind == "device" and str(os.getpid()) != self.home:
            torch.cuda.current_device()  # as a tensor there would
        if self.kind == "socket" and str(os.getpid()) != self.home:
            raise ConnectionError
        return self.x[index].cpu(), index % 4


def cuda_begins() -> None:
    """Let torch believe what it does where CUDA has begun: here, and after a fork."""
    torch.cuda._initialized = True
    in_child = lambda: setattr(torch.cuda, "_is_in_bad_fork", lambda: True)  # noqa: E731
    os.register_at_fork(after_in_child=in_child)


def start(folder: str, kind: str, settings: dict) -> None:
    """Train to a step; write what was found to found.json."""
    begins = settings.pop("cuda_begins", False)
    salt, kind = settings.pop("salt", 0.0), settings.pop("kind", kind)
    if begins:
        cuda_begins()
    try:
        trainer = small_trainer(Path(folder) / "run", dataset=Points(kind, salt), **settings)
        report = trainer.train().resume_report
        found = {d.path: [d.verdict, str(d)] for d in report.differences}
        found["verdict"] = report.verdict
    except UnbrokenError as error:
        found = {"error": f"{error}\n{error.hint}"}
    (Path(folder) / "found.json").write_text(json.dumps(found))


@pytest.fixture
def again(tmp_path):
    """Starts a run of a kind of data for two steps, then again; returns what the second found."""

    def twice(kind: str, first: dict | None = None, **second) -> dict:
        for settings in ({"max_steps": 2, **(first or {})}, {"max_steps": 4, **second}):
            constant = {"lr_scheduler_type": "constant", **settings}
            assert run_fresh(start, str(tmp_path), kind, constant) == 0
        return json.loads((tmp_path / "found.json").read_text())

    return twice


def test_records_are_compared_after_cuda_has_begun(again):
    assert again("plain", {"cuda_begins": True}, cuda_begins=True) == {
        "max_steps": ["harmless", "max_steps: stored 2, now 4: harmless: the run ends elsewhere"],
        "verdict": "exact",
    }


def test_other_records_are_refused_after_cuda_has_begun(again):
    found = again("plain", {"cuda_begins": True}, cuda_begins=True, salt=1.0)
    assert "data.records" in found["error"]


def test_records_on_the_device_are_told_not_to_be_compared(again):
    found = again("device", {"cuda_begins": True}, cuda_begins=True, salt=1.0)
    verdict, line = found["data.records"]
    assert (verdict, found["verdict"]) == ("equivalent", "equivalent")
    assert "now RuntimeError in a process that cannot use the device" in line
    assert "a string `fingerprint` of the data set would be" in line


def test_a_connection_of_the_parent_is_told_and_not_taken_for_equal_records(again):
    assert again("socket", salt=1.0)["data.records"][0] == "equivalent"


def test_a_checkpoint_without_records_is_told(again):
    line = again("plain", {"kind": "socket"})["data.records"][1]
    assert "stored reading one raised ConnectionError" in line
    assert re.search("now [0-9]+ digests", line)


def test_required_exactness_refuses_what_cannot_be_compared_unless_it_is_named(again):
    assert "data.records" in again("socket", exact_resume="require")["error"]
    named = again("socket", exact_resume="require", max_steps=6, allow=["data"])
    assert named["verdict"] == "equivalent"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_real_device_are_told_not_to_be_compared(again):
    assert again("cuda", device="cuda")["data.records"][0] == "equivalent"
