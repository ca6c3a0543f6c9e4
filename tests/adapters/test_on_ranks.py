"""Two ranks over DDP, as accelerate makes them: killed on either, the run is the same run."""

from __future__ import annotations

import signal

import pytest

from adapters.kill_cases import CASES
from unbroken.checkpoint import EXIT_STOPPED

RANKS = {"action": "train_on_ranks", "ranks": 2}
SHORT = {"num_train_epochs": 3, "save_steps": 4}


def case_of(name, **more):
    case = CASES[name]
    return {**RANKS, **case, **more, "args": {**case.get("args", {}), **SHORT}}


NAMES = ["shuffled", "random masks", "lengths grouped", "a sampler of its own"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_two_ranks_is_the_same_run_after_a_kill_in_the_second_epoch(
    name, run, uninterrupted
):
    killed = run(kill_at=11, on_rank=1, **case_of(name))
    assert killed.status == -signal.SIGKILL, killed.text
    resumed = run(**case_of(name))
    assert resumed.status == 0, resumed.text
    assert resumed.first_step == 9
    assert resumed.bits == uninterrupted(**case_of(name)).bits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shuffled", "a sampler of its own"])
def test_two_uninterrupted_ranks_have_the_bits_of_the_hosts_own(name, uninterrupted):
    ours = uninterrupted(**case_of(name))
    assert ours.bits == uninterrupted(**case_of(name, trainer="stock")).bits


@pytest.mark.slow
@pytest.mark.stock
def test_the_hosts_own_replays_the_first_epoch_of_a_sampler_of_its_own(run, uninterrupted):
    case = case_of("a sampler of its own", trainer="stock")
    run(kill_at=11, **case)
    assert run(resume=True, **case).digest != uninterrupted(**case).digest


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(run, uninterrupted):
    stopped = run(kill_at=6, on_rank=1, signal=int(signal.SIGTERM), **case_of("shuffled"))
    assert stopped.status == EXIT_STOPPED, stopped.text
    resumed = run(**case_of("shuffled"))
    assert (resumed.first_step, resumed.bits) == (7, uninterrupted(**case_of("shuffled")).bits)


LIMITED = {**RANKS, "args": {"num_train_epochs": 2, "save_steps": 4, "save_total_limit": 1}}


@pytest.mark.slow
@pytest.mark.stock
def test_the_hosts_own_removes_its_last_whole_checkpoint_before_another_is_there(
    run, uninterrupted
):
    case = {"trainer": "stock", **LIMITED}
    assert run(kill="when rotated", **case).status == -signal.SIGKILL
    assert [folder.name for folder in (run.folder / "run").glob("checkpoint-*")] == ["checkpoint-8"]
    resumed = run(resume=True, **case)
    assert (resumed.status, resumed.first_step) == (0, 9)
    assert resumed.digest != uninterrupted(**case).digest


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", [10, 14])
def test_ours_removes_none_before_another_is_whole(rank, step, run, uninterrupted):
    killed = run(at_storage_step=step * (3 - 2 * rank), on_rank=rank, **LIMITED)
    assert killed.status == -signal.SIGKILL, killed.text
    resumed = run(**LIMITED)
    assert resumed.first_step in (1, 5, 9)
    assert resumed.bits == uninterrupted(**LIMITED).bits


THREE = {
    **RANKS,
    "ranks": 3,
    "args": {"num_train_epochs": 2, "save_steps": 3, "ddp_find_unused_parameters": False},
}


@pytest.mark.slow
def test_three_ranks_add_gradients_after_a_kill_in_the_order_in_which_they_did(run, uninterrupted):
    whole = uninterrupted(**THREE)
    assert run(kill_at=5, on_rank=2, **THREE).status == -signal.SIGKILL
    resumed = run(**THREE)
    assert (resumed.first_step, resumed.bits) == (4, whole.bits), resumed.text
    assert "ddp." not in resumed.text
    assert whole.bits == uninterrupted(trainer="stock", **THREE).bits


@pytest.mark.sweep
@pytest.mark.stock
def test_three_ranks_of_the_hosts_own_add_in_another_order_and_so_do_ours_from_its_checkpoint(
    run, uninterrupted
):
    run(trainer="stock", kill_at=5, on_rank=2, **THREE)
    ours = run(**THREE)
    assert "ddp.model.order: stored not known" in ours.text
    assert ours.digest != uninterrupted(**THREE).digest


@pytest.mark.slow
def test_a_collator_that_knows_its_rank_is_compared_with_that_of_the_rank(run, uninterrupted):
    case = case_of("shuffled", collator="of a rank")
    assert run(kill_at=6, on_rank=1, **case).status == -signal.SIGKILL
    resumed = run(**case)
    assert (resumed.first_step, resumed.bits) == (5, uninterrupted(**case).bits), resumed.text
    assert "rank: stored" not in resumed.text


READ_OTHERWISE = {
    "a sampler that is another in each process": {"sampler": "of the process"},
    "one that is so on one rank": {"sampler": "of the process on rank 1"},
    "weights that training changes": {"sampler": "by loss"},
    "a stream of its own order": {
        "data": "stream of its own order",
        "args": {"max_steps": 15, "accelerator_config": {"dispatch_batches": False}},
    },
    "a stream that rank 0 reads": {"data": "stream of its own order", "args": {"max_steps": 15}},
}


@pytest.mark.parametrize("case", READ_OTHERWISE.values(), ids=READ_OTHERWISE)
def test_what_a_rank_reads_otherwise_when_it_reads_it_again_is_refused(case, run):
    case = {**RANKS, **case, "args": {**SHORT, **case.get("args", {})}}
    assert run(kill_at=11, on_rank=1, **case).status == -signal.SIGKILL
    again = run(**case)
    assert (again.status, again.values) == (1, {}), again.text
    assert "DataError: train_dataset: " in again.text
    assert "what is read again is not what the run was trained on: expected digest" in again.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"changed_data": True}, "rank 1: data.records"),
        ({"args": {**SHORT, "learning_rate": 0.5}}, "rank 1: TrainingArguments.learning_rate"),
    ],
)
def test_ranks_with_other_data_or_arguments_are_named_before_the_first_step(own, says, run):
    refused = run(of_rank={"1": own}, **case_of("shuffled"))
    assert (refused.status, refused.values) == (1, {})
    assert says in refused.text
