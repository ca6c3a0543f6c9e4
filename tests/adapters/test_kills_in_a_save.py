"""Killed in the middle of a save: the host's own cannot go on, ours falls back by itself."""

from __future__ import annotations

import signal

import pytest

WRITES = (
    *("save_pretrained", "training_args.bin", "optimizer.pt", "scheduler.pt"),
    *("rng_state.pth", "trainer_state.json"),
)


@pytest.mark.stock
@pytest.mark.parametrize("name", WRITES)
def test_the_hosts_own_cannot_resume_after_a_kill_before(name, run):
    assert run(trainer="stock", before_write=name).status == -signal.SIGKILL
    resumed = run(trainer="stock", resume=True)
    assert resumed.status == 1
    assert "Can't find a valid checkpoint" in resumed.text or "trainer_state.json" in resumed.text


@pytest.mark.parametrize("name", WRITES[::2])
def test_ours_goes_on_from_the_checkpoint_before_that_the_host_wrote(name, run, uninterrupted):
    run(trainer="stock", before_write=name)
    resumed = run(resume=True)
    assert (resumed.first_step, resumed.digest) == (6, uninterrupted().digest)
    assert any("not used: checkpoint-10" in line for line in resumed.report) or name == WRITES[0]


# Each save takes about 25 steps on the disk: these lie in the first, second and third save.
@pytest.mark.parametrize("step", [20, 27, 33, 41, 50, 58, 66, 75])
def test_ours_is_the_same_run_whenever_the_disk_is_cut_off(step, run, uninterrupted):
    assert run(at_storage_step=step).status == -signal.SIGKILL
    assert run().bits == uninterrupted().bits
