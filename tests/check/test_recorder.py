"""The recorder sees all and changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from check.trials import SCRIPTS
from unbroken.check.isolation import Workspace
from unbroken.check.launch import launch, processes_of
from unbroken.check.recording import read_recordings
from unbroken.recorder.protocol import RecordPlan

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tmp_path):
    """Start words with the recorder; each call has records of its own."""

    def run(*words, folder=tmp_path, count=[0], **plan):  # noqa: B006
        count[0] += 1
        records = tmp_path / f"records-{count[0]}"
        records.mkdir()
        orders = RecordPlan(str(records), parent=os.getpid(), **plan)
        return launch(words, Workspace(folder, tmp_path, (tmp_path,)), records, orders, 120.0)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_script_does_the_same_with_and_without(start, how):
    words = [sys.executable, "-W", "error", str(SCRIPTS / "quiet.py"), how]
    alone = subprocess.run(words, capture_output=True, text=True, check=True, env=ONE_THREAD)
    watched = start(*words)
    assert list(watched.output) == alone.stdout.splitlines()
    assert len(watched.ranks[0].steps) == 12


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    records = tmp_path_factory.mktemp("records")
    orders = RecordPlan(str(records), parent=os.getpid())
    words = [sys.executable, str(SCRIPTS / "quiet.py")]
    done = launch(words, Workspace(records, records, (records,)), records, orders, 120.0)
    return done.ranks[0]


def test_every_step_has_its_data_loss_and_rate(quiet):
    assert all(len(step.inputs) == len(step.losses) == 1 for step in quiet.steps)
    assert {step.learning_rates for step in quiet.steps} == {(1e-2,)}


def test_the_samples_are_known_with_and_without_workers(quiet):
    for steps in (quiet.steps[:6], quiet.steps[6:]):
        taken = [sample for step in steps for fetch in step.fetched for sample in fetch.samples]
        assert sorted(taken) == list(range(24))


def test_the_names_of_the_parameters_are_known(quiet):
    assert quiet.names == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_the_state_after_a_step_is_not_that_before(quiet):
    assert quiet.steps[0].before != quiet.steps[0].after
    assert len({step.after.params for step in quiet.steps}) == 12


def test_all_three_generators_are_watched(quiet):
    assert set(quiet.steps[0].generators) == {"python", "numpy", "torch"}


def test_the_kill_comes_right_after_the_step(start):
    killed = start(sys.executable, str(SCRIPTS / "quiet.py"), kill_after=5)
    assert (killed.status, killed.output) == (-signal.SIGKILL, ())
    assert len(killed.ranks[0].steps) == 5


def test_the_kill_reaches_a_shell_above(start):
    script = SCRIPTS / "quiet.py"
    killed = start("sh", "-c", f"{sys.executable} {script}; echo survived", kill_after=3)
    assert (killed.status, killed.output) == (-signal.SIGKILL, ())


def test_the_stop_is_quiet_and_right_after_the_step(start):
    stopped = start(sys.executable, str(SCRIPTS / "quiet.py"), stop_after=4)
    assert (stopped.status, stopped.output, len(stopped.ranks[0].steps)) == (0, (), 4)


def test_a_sitecustomize_of_the_user_is_still_imported(start, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('mine')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert start(sys.executable, "-c", "print('script')").output == ("mine", "script")


def test_a_process_that_trains_nothing_leaves_no_recording(start):
    done = start(sys.executable, "-c", "import torch")
    assert (done.status, done.ranks) == (0, {})


def test_a_launch_that_takes_too_long_is_ended_with_all_it_started(tmp_path):
    orders = RecordPlan(str(tmp_path), parent=os.getpid())
    place = Workspace(tmp_path, tmp_path, (tmp_path,))
    done = launch(["sh", "-c", "setsid sleep 600 & sleep 600"], place, tmp_path, orders, 0.5)
    assert done.is_timed_out
    assert processes_of(tmp_path / "plan.json") == []


def test_an_error_of_the_recorder_ends_the_watching_not_the_script(server, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "class Odd(dict):\n"
        "    def values(self): raise RuntimeError('mine')\n"
        "class Net(torch.nn.Linear):\n"
        "    def forward(self, odd): return super().forward(odd['x'])\n"
        "Net(2, 2)(Odd(x=torch.ones(2)))\n"
        "print('lives')\n"
    )
    plan = tmp_path / "plan.json"
    RecordPlan(str(tmp_path), parent=server.pid).write(plan)
    status, _ = server.run_script([str(script)], tmp_path, plan, tmp_path / "log")
    assert (status, (tmp_path / "log").read_text()) == (0, "lives\n")
    assert "RuntimeError: mine" in read_recordings(tmp_path)[0].errors[0]


def test_a_torn_last_line_is_left_out(tmp_path):
    whole = json.dumps({"kind": "process", "rank": 3, "world_size": 4})
    (tmp_path / "rank3-pid1.jsonl").write_text(f'{whole}\n{{"kind":"step","st')
    recording = read_recordings(tmp_path)[3]
    assert (recording.world_size, recording.steps) == (4, ())
