"""Another number of ranks: the host's own loses its place, ours keeps it in samples."""

from __future__ import annotations

import signal

import pytest

from unbroken.checkpoint import EXIT_STOPPED

RANKS = {"action": "train_on_ranks", "ranks": 2}
EPOCHS = {"num_train_epochs": 2, "save_steps": 4}
ONE, TWO = {"args": EPOCHS}, {**RANKS, "args": EPOCHS}
LEFT_OF_TWO, LEFT_OF_ONE = 2 * 48 - 4 * 8, 2 * 48 - 4 * 4
# One rank waits for the other: for half an hour, unless the test ends it. The host begins to save
# 3 s after the signal.
JIT = {"enable_jit_checkpoint": True, "max_steps": 4000, "save_strategy": "no", "ddp_timeout": 8}
SECONDS_LEFT = 12


@pytest.mark.slow
@pytest.mark.stock
def test_the_hosts_own_trains_other_samples_on_other_ranks_without_a_word(run):
    run(trainer="stock", kill_at=5, **TWO)
    resumed = run(trainer="stock", resume=True, **ONE)
    assert (resumed.status, resumed.first_step) == (0, 5)
    assert len(resumed.read) == 2 * 48 - 4 * 4  # as if each step had had 4 samples
    assert "rank" not in resumed.text.lower()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(TWO, ONE), (ONE, TWO)])
def test_ours_refuses_steps_of_another_size_that_nobody_names(first, then, run):
    run(kill_at=5, **first)
    refused = run(**then)
    assert refused.status == 1
    assert "DifferenceError" in refused.text
    assert "total_batch_size: stored" in refused.text


@pytest.mark.slow
def test_ours_reads_on_one_rank_what_two_have_left(run):
    run(kill_at=5, **TWO)
    resumed = run(allow=["total_batch_size"], **ONE)
    assert (resumed.first_step, resumed.step) == (5, 4 + LEFT_OF_TWO // 4)
    assert len(resumed.read) == LEFT_OF_TWO
    assert sorted(resumed.read[16:]) == list(range(48))  # the second epoch is whole


@pytest.mark.slow
def test_ours_reads_on_two_ranks_what_one_has_left(run):
    run(kill_at=5, **ONE)
    resumed = run(allow=["total_batch_size"], **TWO)
    assert (resumed.first_step, resumed.step) == (5, 4 + LEFT_OF_ONE // 8)
    assert len(resumed.read) == LEFT_OF_ONE // 2


@pytest.mark.slow
def test_steps_of_the_same_size_go_on_with_the_same_samples(run):
    run(kill_at=5, **TWO)
    resumed = run(args={**EPOCHS, "gradient_accumulation_steps": 2})
    assert resumed.step == 12
    assert "gradient_accumulation_steps: stored 1, now 2: equivalent" in resumed.text
    assert "environment.world_size: stored 2, now 1: equivalent" in resumed.text


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [5, 8])
def test_a_stock_checkpoint_of_two_ranks_goes_on_as_the_hosts_own_would(
    kill_at, run, uninterrupted
):
    assert run(trainer="stock", kill_at=kill_at, on_rank=1, **TWO).status == -signal.SIGKILL
    assert (run.folder / "run/checkpoint-4/rng_state_1.pth").exists()
    resumed = run(**TWO)
    assert resumed.first_step == 5, resumed.text
    assert resumed.digest == uninterrupted(trainer="stock", **TWO).digest


@pytest.mark.slow
def test_a_stock_checkpoint_of_two_ranks_keeps_its_place_on_one(run):
    run(trainer="stock", kill_at=5, **TWO)
    assert "total_batch_size: stored 8, now 4" in run(**ONE).text
    resumed = run(allow=["total_batch_size"], **ONE)
    assert len(resumed.read) == LEFT_OF_TWO
    assert "world_size: stored 2, now 1: equivalent" in resumed.text


@pytest.mark.slow
def test_two_ranks_of_ours_go_on_in_the_hosts_own(run, uninterrupted):
    from unbroken.cli.main import main

    run(kill_at=5, **TWO)
    target = run.folder / "stock/checkpoint-4"
    assert main(["export", str(run.folder / "run"), str(target), "--to", "transformers"]) == 0
    resumed = run("stock", trainer="stock", resume=True, **TWO)
    assert (resumed.first_step, resumed.digest) == (5, uninterrupted(**TWO).digest)


@pytest.mark.slow
@pytest.mark.stock
def test_a_signal_to_one_rank_of_the_hosts_own_leaves_no_whole_checkpoint(run):
    signalled = {"kill_at": 6, "on_rank": 1, "signal": 15, "seconds_left": SECONDS_LEFT}
    stopped = run(trainer="stock", args=JIT, **signalled, **RANKS)
    whole = {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"}
    found = list((run.folder / "run").glob("checkpoint-*"))
    assert found, stopped.text  # it began to save
    assert not any(whole <= {path.name for path in folder.iterdir()} for folder in found)
    assert stopped.status not in (0, EXIT_STOPPED)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_of_ours_saves_a_whole_checkpoint_of_all(rank, run, uninterrupted):
    stopped = run(kill_at=6, on_rank=rank, signal=15, **TWO)
    assert stopped.status == EXIT_STOPPED, stopped.text
    assert stopped.text.count("stopped by SIGTERM after step 6") == 1
    resumed = run(**TWO)
    assert (resumed.first_step, resumed.bits) == (7, uninterrupted(**TWO).bits)
