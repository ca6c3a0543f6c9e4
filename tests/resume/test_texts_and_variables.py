"""Texts in globals and variables of the environment that code of an object uses are compared."""

from __future__ import annotations

import os
import signal

import pytest

from quiet.programs import loop, trainer
from quiet.running import KILLED_AT, SAVED_AT, run

MODEL = """
class Scaled(Net):
    def forward(self, x):
        return super().forward(x) * ({scale})

torch.manual_seed(0)
model = Scaled()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
"""
READS = {
    "an item": 'float(os.environ["SCALE_OF_IT"])',
    "get": 'float(os.environ.get("SCALE_OF_IT", "1"))',
    "getenv": 'float(os.getenv("SCALE_OF_IT", "1"))',
    "is there": '2.0 if "SCALE_OF_IT" in os.environ and os.environ["SCALE_OF_IT"] > "1" else 1.0',
}


def started_with(value: str | None, program, folder, kill_at=-1) -> dict:
    name = "SCALE_OF_IT"
    before = f"import os\nos.environ[{name!r}] = {value!r}\n" if value else ""
    assert name not in os.environ
    return run(before + program, folder, kill_at)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_variable_that_a_model_of_a_loop_reads_is_compared(read, tmp_path):
    program = loop(before=MODEL.format(scale=read))
    assert started_with("1", program, tmp_path, KILLED_AT)["status"] == -signal.SIGKILL
    found = started_with("2", program, tmp_path)
    assert found.get("error") == "DifferenceError", found
    assert "model.globals.Scaled.environ.SCALE_OF_IT" in found["message"]
    same = started_with("1", program, tmp_path)
    assert (same.get("step"), {*same["differences"]} - script(same)) == (SAVED_AT, set()), same


def script(found: dict) -> set[str]:
    return {line for line in found["differences"] if line.startswith("code.script_digest")}


LOSS = """
{before}

def loss_of(found, labels):
    error = F.cross_entropy(found, labels)
    return {after}
"""
IN_A_LOSS = {
    "a variable": ("", "error * float(os.environ.get('SCALE_OF_IT', '3'))", "environ.SCALE_OF_IT"),
    "a text that came from one": (
        "KIND = os.environ.get('SCALE_OF_IT', 'no')",
        "error * (2.0 if KIND == '1' else 1.0)",
        "KIND",
    ),
}


@pytest.mark.parametrize("case", IN_A_LOSS.values(), ids=IN_A_LOSS)
def test_what_a_loss_of_a_trainer_takes_from_the_environment_is_compared(case, tmp_path):
    before, after, name = case
    program = trainer(before=LOSS.format(before=before, after=after), loss="loss_of")
    assert started_with("1", program, tmp_path, KILLED_AT)["status"] == -signal.SIGKILL
    for other in ("2", None):
        found = started_with(other, program, tmp_path)
        assert found.get("error") == "DifferenceError", found
        assert f"loss.values.{name}" in found["message"]


PASSING = "RANK MASTER_PORT SLURM_JOB_ID HOSTNAME WANDB_NAME LOG_DIR API_TOKEN OMP_NUM_THREADS"
UNLIKE = """
WHERE, WHEN, HERE = f"/logs/{KILL_AT}", f"2026-10-0{3 + abs(KILL_AT) % 2}", __name__
for name in "{names}".split():
    os.environ[name] = str(KILL_AT)
os.environ["LOGS"], os.environ["OMP_NUM_THREADS"] = WHERE, "1"


def loss_of(found, labels):
    told = [WHERE, WHEN, HERE, __name__, {reads}, os.environ["LOGS"]]
    return F.cross_entropy(found, labels)
"""


def test_paths_dates_and_what_each_start_has_anew_are_no_difference(tmp_path):
    names = PASSING.rpartition(" ")[0]  # threads are told by themselves
    reads = ", ".join(f"os.environ[{name!r}]" for name in PASSING.split())
    program = trainer(
        before=UNLIKE.replace("{names}", names).replace("{reads}", reads), loss="loss_of"
    )
    assert run(program, tmp_path, KILLED_AT)["status"] == -signal.SIGKILL
    found = run(program, tmp_path)
    assert (found.get("verdict"), found.get("differences")) == ("exact", []), found
