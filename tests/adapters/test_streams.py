"""Iterable data sets: those that know their place, and those that rank 0 reads for all."""

from __future__ import annotations

import signal

import pytest

KNOWS = {"data": "stream with state", "args": {"max_steps": 30, "save_steps": 5}}
RANKS = {"action": "train_on_ranks", "ranks": 2, "data": "stream shuffled"}
READ_BY_RANK_0 = {**RANKS, "args": {"max_steps": 15, "save_steps": 4}}
READ_BY_ALL = {
    **RANKS,
    "data": "stream",
    "args": {**READ_BY_RANK_0["args"], "accelerator_config": {"dispatch_batches": False}},
}


@pytest.mark.parametrize("kill_at", [8, 13, 23])
def test_a_stream_that_knows_its_place_is_not_read_again(kill_at, run, uninterrupted):
    run(kill_at=kill_at, **KNOWS)
    resumed = run(**KNOWS)
    assert resumed.bits == uninterrupted(**KNOWS).bits
    done = kill_at // 5 * 5
    assert len(resumed.read) <= (30 - done + 2) * 4  # the host reads two batches ahead


def test_a_window_of_several_batches_is_at_its_place_too(run, uninterrupted):
    case = {**KNOWS, "args": {**KNOWS["args"], "gradient_accumulation_steps": 5}}
    run(kill_at=8, **case)
    resumed = run(**case)
    assert resumed.bits == uninterrupted(**case).bits
    # A pass has two windows of 5 batches, and two batches that no step uses.
    assert len(resumed.read) == 28 + 11 * 48 + 44


def test_data_that_draw_from_a_generator_of_their_own_are_never_called_exact(run):
    assert "data.repeatable: not covered" in run(data="noisy", kill_at=8).text
    report = run(data="noisy").report
    assert report[0].endswith("not known to be exact")
    assert sum("data.repeatable: not covered: record 0 is not the same" in x for x in report) == 1
    assert "DifferenceError" in run(data="noisy", exact_resume="require").text


READ_OTHERWISE = {
    "a generator in a stream": ({"data": "stream of its own order"}, 21, "dataset.rng"),
    "a sampler of the process": ({"sampler": "of the process"}, 21, "batches 0 to "),
    "weights that training changes": ({"sampler": "by loss"}, 8, "batch_sampler.sampler.weights"),
}


@pytest.mark.parametrize("name", READ_OTHERWISE)
def test_data_that_come_otherwise_when_they_are_read_again_are_refused(name, run):
    case, kill_at, what = READ_OTHERWISE[name]
    case = {**case, "args": {"max_steps": 30, "save_steps": 5}}
    run(kill_at=kill_at, **case)
    text = run(**case).text
    assert "DataError: train_dataset: " in text
    assert what in text
    assert "what is read again is not what the run was trained on: expected digest" in text
    named = run(allow=["data"], **case)
    assert named.first_step == kill_at // 5 * 5 + 1, named.text


@pytest.mark.parametrize("kill_at", [14, 21], ids=["end of an epoch", "inside of one"])
def test_a_sampler_that_counts_its_passes_goes_on_with_the_next_one(kill_at, run, uninterrupted):
    case = {"sampler": "counting", "args": {"max_steps": 30, "save_steps": 6}}
    run(kill_at=kill_at, **case)
    resumed = run(**case)
    assert resumed.first_step == kill_at // 6 * 6 + 1, resumed.text
    assert resumed.bits == uninterrupted(**case).bits
    assert resumed.report[0].endswith(": exact")


def test_a_stream_of_its_own_order_goes_on_in_its_first_pass(run, uninterrupted):
    case = {"data": "stream of its own order", "args": {"max_steps": 15, "save_steps": 5}}
    run(kill_at=8, **case)
    resumed = run(**case)
    assert resumed.bits == uninterrupted(**case).bits


@pytest.mark.slow
@pytest.mark.stock
def test_the_hosts_own_reads_it_all_again(run):
    case = {"trainer": "stock", **KNOWS}
    run(kill_at=13, **case)
    assert len(run(resume=True, **case).read) >= 30 * 4


@pytest.mark.slow
@pytest.mark.parametrize("case", [READ_BY_RANK_0, READ_BY_ALL])
def test_a_stream_on_two_ranks_is_the_same_run_after_a_kill(case, run, uninterrupted):
    killed = run(kill_at=9, on_rank=1, **case)  # 6 steps in a pass
    assert killed.status == -signal.SIGKILL, killed.text
    resumed = run(**case)
    assert resumed.first_step == 9, resumed.text
    assert resumed.bits == uninterrupted(**case).bits


@pytest.mark.slow
def test_a_stream_that_rank_0_reads_is_refused_without_its_keys(run):
    run(kill_at=9, on_rank=1, **READ_BY_RANK_0)
    refused = run(sabotage="keys", **READ_BY_RANK_0)
    assert "what is read again is not what the run was trained on" in refused.text


def test_larger_batches_of_a_stream_begin_where_the_samples_are(run):
    run(kill_at=13, **KNOWS)
    larger = {"args": {**KNOWS["args"], "per_device_train_batch_size": 8, "max_steps": 14}}
    resumed = run(
        data="stream", allow=["per_device_train_batch_size", "data", "max_steps"], **larger
    )
    assert (resumed.first_step, resumed.step) == (11, 14), resumed.text


def test_a_stream_cannot_begin_inside_of_a_batch(run):
    run(kill_at=6, **KNOWS)
    larger = {"args": {**KNOWS["args"], "per_device_train_batch_size": 8}}
    refused = run(data="stream with state", allow=["per_device_train_batch_size"], **larger)
    assert "expected a multiple of 8, found 20 samples done" in refused.text
