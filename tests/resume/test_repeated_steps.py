"""Steps that a resume takes again: are they those of the killed run? What differs is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fresh import run_fresh
from repeated_loops import Loop, run_starts
from scenarios import Cut, Scenario, killed, metrics, train
from small_trainers import PAIRS, bits, small_model, small_trainer, steps_in
from unbroken import Checkpointer, DifferenceError, ResumePolicy, TrainingStopped
from unbroken.data import batch_source
from unbroken.step_records import ComparedParts, Recorded, StepObserver, compare_steps
from unbroken.training import Callback

CUT = Cut(step=9, save_steps=5)  # killed in step 9: 6 to 8 were taken after checkpoint-5
EVERYTHING = Scenario(workers=2, accumulation=2)
HALF = Scenario(model="batchnorm", precision="fp16")

CULPRITS = [  # what is left out, in which run, and the words by which that is named
    ("model", EVERYTHING, "weights differ before the step"),
    ("optimizer", EVERYTHING, "the optimizer was not restored"),
    ("scheduler", EVERYTHING, "the scheduler, or what else sets the rate"),
    ("data", EVERYTHING, "the batch is"),
    ("order of the data", EVERYTHING, "the batch is another one"),
    ("keys of the samples", EVERYTHING, "the batch is another one"),
    ("keys of the forward passes", EVERYTHING, "something else that the forward pass depends on"),
    ("buffers", HALF, "buffers or weights that no optimizer moves differ"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the killed run of each scenario."""
    return {
        scenario: killed(scenario, CUT, tmp_path_factory.mktemp("run"))
        for scenario in (EVERYTHING, HALF)
    }


def repeated(run, left_out=None):
    """Resume a copy of a killed run; return what its history tells of repeated steps."""
    folder = run.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.folder / "killed", folder)
    arguments = (run.scenario, str(folder), CUT.save_steps, CUT, left_out)
    assert run_fresh(train, *arguments) in (0, -signal.SIGKILL)  # the same command, killed again
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == "repeated"]


@pytest.mark.parametrize("scenario", [EVERYTHING, HALF], ids=["everything", "fp16"])
def test_repeated_steps_with_the_same_bits_are_confirmed(runs, scenario):
    (found,) = repeated(runs[scenario])
    assert (found["from"], found["to"], found["same"]) == (6, 8, True)


@pytest.mark.parametrize(("part", "scenario", "words"), CULPRITS, ids=[one[0] for one in CULPRITS])
def test_what_a_resume_forgets_is_found_where_it_first_shows(runs, part, scenario, words):
    *_, found = repeated(runs[scenario], left_out=part)
    shows_later = part == "scheduler"  # its rate for step 6 stands in the optimizer
    assert (found["same"], found["step"]) == (False, 6 + shows_later)
    assert words in found["words"]


# A hand-written loop


@pytest.fixture
def loop(tmp_path):
    """Run starts of a loop in one run directory; return the statuses, and what was told."""
    return partial(run_starts, tmp_path / "run")


KILLED = Loop(kill_after=10)  # 9 and 10 were taken after checkpoint-8
STRICT = ResumePolicy(exact_resume="require")


def test_a_loop_tells_of_repeated_steps_once(loop):
    statuses, told = loop(KILLED, Loop())
    assert statuses == [-signal.SIGKILL, 0]
    assert told[-1] == "steps 9 to 10 repeated with the same bits"


def test_a_killed_start_that_took_no_further_step_leaves_nothing_to_tell_of(loop):
    _, told = loop(Loop(kill_after=8), Loop())
    assert not [line for line in told if "repeated" in line]


def test_a_number_that_nobody_saved_is_told_and_the_run_is_no_longer_exact(loop):
    statuses, told = loop(KILLED, Loop(kill_after=13, temperature=2.0), Loop(temperature=2.0))
    assert statuses[-1] == 0
    (line,) = [line for line in told if "step 9 was not repeated with the same bits" in line][:1]
    assert "something else that the forward pass depends on was not saved" in line
    assert any(line.endswith("(step 12): not known to be exact") for line in told)


def test_under_require_a_resume_that_forgets_never_commits(loop, tmp_path):
    strict = Loop(temperature=2.0, policy=STRICT)
    statuses, _ = loop(KILLED, strict, strict)
    assert statuses == [-signal.SIGKILL, 1, 1]
    assert steps_in(tmp_path / "run") == [4, 8]


def test_under_require_the_right_resume_still_goes_on_after_a_wrong_one(loop, tmp_path):
    statuses, told = loop(KILLED, Loop(temperature=2.0, policy=STRICT), Loop(policy=STRICT))
    assert statuses == [-signal.SIGKILL, 1, 0]
    assert "steps 9 to 10 repeated with the same bits" in told
    assert told[-1].startswith("an earlier start differs from these two:")


def test_under_require_a_name_accepts_what_was_not_repeated(loop):
    accepting = ResumePolicy(exact_resume="require", allow=["repeated_steps"])
    assert loop(KILLED, Loop(temperature=2.0, policy=accepting))[0][-1] == 0


def test_two_wrong_resumes_that_agree_do_not_outvote_the_killed_run(loop):
    wrong = Loop(kill_after=11, temperature=2.0)
    _, told = loop(KILLED, wrong, wrong)
    assert "another resume of the same checkpoint gave the same bits" in told[-1]


@pytest.mark.parametrize("damage", [b"", b"[1]\n", b"\xff" * 40, None])
def test_damaged_records_are_none(loop, tmp_path, damage):
    loop(KILLED)
    (path,) = (tmp_path / "run" / "step-records").glob("*-after8.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] if damage is None else damage)
    statuses, told = loop(Loop())
    assert statuses == [0]
    found = [line for line in told if "repeated" in line]
    assert found == (["step 9 repeated with the same bits"] if damage is None else [])


def test_records_after_checkpoints_that_are_gone_go_with_them(loop, tmp_path):
    loop(KILLED)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    loop(Loop())
    assert not [*(tmp_path / "run" / "step-records").glob("*-after4.jsonl")]


def test_records_are_never_the_reason_why_a_run_fails(loop, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    loop(Loop(kill_after=1))
    (folder / "step-records").write_text("in the way")
    statuses, _ = loop(Loop())
    assert statuses == [0]


@pytest.mark.parametrize("cut", [[200, 200], [257], [400]])
def test_of_more_samples_than_are_looked_at_none_is_known_however_they_are_cut(cut):
    weight = nn.Parameter(torch.zeros(1))
    optimizer, found = torch.optim.SGD([weight]), []
    source = batch_source(torch.zeros(4, 1), global_batch_size=1, seed=0)
    observer = StepObserver({"optimizer": optimizer, "data": source}, found.append)
    observer.begin(is_recording=True)
    for size in cut:
        observer.note_batch(torch.ones(size, 2))
    weight.sum().backward()
    optimizer.step()
    observer.end()
    (record,) = found
    assert (record.samples, len(record.batches)) == ((), len(cut))
    other = record._replace(batches=("another",), losses=("0x1.0p+0",))
    words = compare_steps(Recorded("", {1: record}), other, ComparedParts(("batch",)))
    assert words.difference.words.startswith("the batch is another one")


# What the two Trainers say


class FailOnce(Callback):
    """Fails after step 5 in the first start, and is the same callback in the second."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def on_step_end(self, trainer) -> None:
        if trainer.progress.step == 5 and not self.marker.exists():
            self.marker.touch()
            raise ZeroDivisionError


def test_the_report_of_a_trainer_says_what_was_repeated(tmp_path):
    callbacks = {"callbacks": [FailOnce(tmp_path / "has failed")]}
    with pytest.raises(ZeroDivisionError):
        small_trainer(tmp_path / "run", trainer=callbacks).train()
    again = small_trainer(tmp_path / "run", trainer=callbacks)
    again.train()
    report = again.resume_report
    assert report.verdict == "exact"
    assert "step 5 repeated with the same bits" in report.notes


class StopOnce(Callback):
    """Sends this process SIGTERM in step 3 of the first start."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def on_micro_batch_end(self, trainer) -> None:
        if trainer.progress.step == 2 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("confirms", [True, False])
def test_a_stop_leaves_a_step_to_compare_where_that_is_asked_for(tmp_path, confirms):
    def trainer():
        stop = {"callbacks": [StopOnce(tmp_path / "has stopped")]}
        return small_trainer(tmp_path / "run", trainer=stop, confirm_stops=confirms)

    with pytest.raises(TrainingStopped) as stopped:
        trainer().train()
    assert (stopped.value.step, steps_in(tmp_path / "run")[-1]) == (3, 3)
    again = trainer()
    again.train()
    told = [line for line in again.resume_report.notes if "repeated" in line]
    assert told == ["step 4 repeated with the same bits"] * confirms


AT_STOP = "the state and the next samples are as they were at the stop"


class Meddling(Callback):
    """Changes the weights of the model where it gets its own state back."""

    def __init__(self) -> None:
        self.model = None

    def on_train_begin(self, trainer) -> None:
        self.model = trainer.model

    def state_dict(self):
        return {}

    def load_state_dict(self, state) -> None:
        with torch.no_grad():
            self.model[0].weight /= 2


def stopped_and_resumed(tmp_path, meddling=None, **settings):
    """Stop a run by a signal; return the Trainer that resumes it."""

    def trainer(*more):
        callbacks = [StopOnce(tmp_path / "has stopped"), *more]
        return small_trainer(tmp_path / "run", trainer={"callbacks": callbacks}, **settings)

    with pytest.raises(TrainingStopped):
        trainer(*meddling or []).train()
    again = trainer(*meddling or [])
    for one in meddling or []:
        one.model = again.model
    return again


@pytest.mark.parametrize("mode", ["blocking", "async", "overlap"])
def test_after_a_stop_the_state_and_the_next_samples_are_compared(tmp_path, mode):
    again = stopped_and_resumed(tmp_path, save_mode=mode)
    again.train()
    assert AT_STOP in again.resume_report.notes
    assert again.resume_report.verdict == "exact"


def stop_in_a_loop(folder, at):
    """Run a loop over steps that gets SIGTERM in one; return what was told."""
    torch.manual_seed(0)
    model, told = small_model(), []
    optimizer = torch.optim.AdamW(model.parameters())
    objects = {"model": model, "optimizer": optimizer, "data": PAIRS}
    run = Checkpointer(folder, save_steps=2, tell=told.append, **objects)
    with run, suppress(TrainingStopped):
        for inputs, labels in run.steps(6, batch_size=4):
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if run.step == at:
                os.kill(os.getpid(), signal.SIGTERM)
    return told


def test_a_loop_that_was_stopped_says_what_is_as_it_was(tmp_path):
    assert "stopped" in stop_in_a_loop(tmp_path / "run", at=3)[-1]
    assert AT_STOP in stop_in_a_loop(tmp_path / "run", at=None)


def test_weights_that_another_object_changes_while_it_loads_are_named_after_a_stop(tmp_path):
    again = stopped_and_resumed(tmp_path, [Meddling()])
    again.train()
    (found,) = again.resume_report.differences
    assert found.effect.startswith("after the stop at step 3: model is not what it was")
    assert again.resume_report.verdict == "not covered"


def test_under_require_such_weights_are_refused_before_the_first_step(tmp_path):
    again = stopped_and_resumed(tmp_path, [Meddling()], exact_resume="require")
    with pytest.raises(DifferenceError, match="after the stop at step 3"):
        again.train()
    assert steps_in(tmp_path / "run")[-1] == 3


def test_a_run_that_confirms_its_stops_ends_with_the_same_bits(tmp_path):
    whole = small_trainer(tmp_path / "whole")
    whole.train()
    stop = {"callbacks": [StopOnce(tmp_path / "has stopped")]}
    with pytest.raises(TrainingStopped):
        small_trainer(tmp_path / "run", trainer=stop, confirm_stops=True).train()
    again = small_trainer(tmp_path / "run", trainer=stop, confirm_stops=True)
    again.train()
    assert bits(again.model) == bits(whole.model)
    assert [one["step"] for one in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
