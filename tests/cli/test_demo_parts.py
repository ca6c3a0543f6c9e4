"""The parts of the demo: its plan of kills, its comparison, its children."""

from __future__ import annotations

import json
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.sample_run import make_run
from unbroken.cli.demo import (
    Child,
    ChildFailedError,
    RunObserver,
    RunStart,
    compare_runs,
    plan_kills,
    save_steps_for,
)
from unbroken.errors import CorruptCheckpointError


@given(st.integers(1, 12), st.integers(12, 500), st.integers(0, 2**32))
def test_every_plan_has_one_kill_inside_a_save_and_several_saves_left_for_it(kills, steps, seed):
    plan = plan_kills(kills=kills, steps=steps, seed=seed)
    assert len(plan) == kills
    assert [moment.kind for moment in plan].count("saving") == 1
    assert all(1 <= moment.step < steps - 2 * save_steps_for(steps) for moment in plan)
    assert [moment.step for moment in plan] == sorted(moment.step for moment in plan)


def test_a_seed_repeats_the_plan_and_another_one_does_not():
    plans = [plan_kills(kills=4, steps=60, seed=seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@pytest.fixture
def runs(tmp_path):
    """Two runs that differ in wall time alone."""
    return make_run(tmp_path / "one", seconds=3), make_run(tmp_path / "other", seconds=4)


def differing(runs, step=20):
    return {finding.what for finding in compare_runs(*runs, step=step) if not finding.is_same}


def test_runs_that_differ_in_wall_time_alone_are_the_same(runs):
    assert differing(runs) == set()
    assert all(finding.total > 0 for finding in compare_runs(*runs, step=20))


def test_another_weight_is_found(tmp_path):
    runs = make_run(tmp_path / "one", fill=7), make_run(tmp_path / "other", fill=8)
    assert differing(runs) == {"weights"}


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("loss", 2.8000000000000003, "loss of each step"),
        ("data_digest", "0" * 32, "order of the data"),
        ("learning_rate", 0.1, "all other metrics"),
    ],
)
def test_another_metric_of_one_step_is_found(runs, field, value, found):
    change_metrics(runs[1], lambda lines: [*lines[:2], {**lines[2], field: value}, *lines[3:]])
    assert differing(runs) == {found}


def test_another_wall_time_of_a_step_is_no_difference(runs):
    change_metrics(runs[1], lambda lines: [{**line, "seconds": 99.0} for line in lines])
    assert differing(runs) == set()


def test_a_step_that_was_logged_twice_is_found(runs):
    change_metrics(runs[1], lambda lines: [lines[0], *lines])
    assert "loss of each step" in differing(runs)


def test_nothing_to_compare_is_not_the_same(runs):
    for run in runs:
        change_metrics(run, lambda lines: [])
    assert differing(runs) >= {"loss of each step", "order of the data"}


def test_a_damaged_checkpoint_is_not_compared(runs):
    with (runs[1] / "checkpoint-20" / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(CorruptCheckpointError):
        compare_runs(*runs, step=20)


def change_metrics(run, change):
    path = run / "metrics.jsonl"
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(f"{canonical(line)}\n" for line in lines))


def canonical(line):
    return json.dumps(line, sort_keys=True, separators=(",", ":"))


def test_a_start_tells_what_it_found_and_what_it_swept():
    record = {
        "checkpoint": "/runs/killed/checkpoint-20",
        "rejected": [{"checkpoint": "checkpoint-30", "reason": "state.json: is missing"}],
        "set_aside": [{"from": "checkpoint-30", "to": "set-aside/checkpoint-30.1"}],
    }
    lines = RunStart(record, staged=()).lines(left=["checkpoint-40.1"])
    assert [" ".join(line.split()) for line in lines] == [
        "start goes on from checkpoint-20",
        "swept the half-written .staging/checkpoint-40.1",
        "not used: checkpoint-30: state.json: is missing",
        "set aside: checkpoint-30 is now set-aside/checkpoint-30.1",
    ]


def test_what_is_still_there_was_not_swept():
    record = {"checkpoint": None, "rejected": [], "set_aside": []}
    lines = RunStart(record, staged=("checkpoint-40.1",)).lines(left=["checkpoint-40.1"])
    assert len(lines) == 1


def test_a_child_that_fails_by_itself_shows_its_output(tmp_path):
    child = Child(["missing.yaml"], tmp_path, tmp_path / "log")
    with child, pytest.raises(ChildFailedError, match="ended with status 2") as failure:
        child.finish()
    assert "missing.yaml: no such file" in failure.value.hint


def test_a_child_ends_with_its_context(tmp_path):
    with Child(["--help"], tmp_path, tmp_path / "log") as child:
        child.freeze()
        pid = child.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_watching_a_run_that_is_not_there_yet_sees_nothing(tmp_path):
    watch = RunObserver(tmp_path / "nothing")
    assert (watch.starts(), watch.metrics(), watch.step(), watch.staged()) == ([], [], 0, [])
