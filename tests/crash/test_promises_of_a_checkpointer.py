"""What a Checkpointer promises when `save` returns, on a disk that loses what was not synced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crash.faulty_runs import LeavesOut
from store.small_runs import RUN_ID, files_of, leaves_of, newest_state, save, state_of
from unbroken.checkpoint import Checkpointer, SavePolicy
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, CheckpointWriter, store_leaves
from unbroken.testing import POWER_CUT_MODES, FaultyStorage

EACH_CUT = pytest.mark.parametrize("mode", POWER_CUT_MODES)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(4, 4)


def resumed(disk: FaultyStorage) -> tuple[int, list]:
    """Resume on a disk; return the step, and the lines of metrics that are there."""
    with Checkpointer(disk, model=model()) as checkpointer:
        step = checkpointer.resume("must").step
        return step, list(checkpointer.run.metrics.records())


@EACH_CUT
@pytest.mark.parametrize("save_mode", ["blocking", "async", "overlap"])
def test_the_metrics_that_a_checkpoint_knows_of_survive_a_power_cut_with_it(save_mode, mode):
    disk = FaultyStorage()
    checkpointer = Checkpointer(disk, model=model(), save=SavePolicy(mode=save_mode))
    lines = [{"step": step, "loss": 0.5} for step in (1, 2)]
    for line in lines:
        checkpointer.log(line)
        checkpointer.save(line["step"])
    checkpointer.wait()
    assert resumed(disk.after_power_cut(mode)) == (2, lines)


@EACH_CUT
def test_metrics_that_are_not_synced_are_lost_in_a_power_cut(mode):
    """The negative control: the disk does forget them."""
    disk = FaultyStorage()
    checkpointer = Checkpointer(disk, model=model())
    checkpointer.save(1)
    checkpointer.log({"step": 2})
    assert resumed(disk.after_power_cut(mode)) == (1, [])


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "state.safetensors"])
def test_a_checkpoint_that_was_damaged_is_replaced_when_the_same_state_is_saved_again(
    name, tmp_path
):
    checkpointer = Checkpointer(tmp_path, model=model())
    path = checkpointer.save(1)
    damage(tmp_path / "checkpoint-1" / name)
    assert checkpointer.save(1) == path
    checkpointer.close()
    assert CheckpointReader(LocalStorage(tmp_path), "checkpoint-1").verify() == []
    with Checkpointer(tmp_path, model=model()) as again:
        assert again.resume("must").rejected == ()


def damage(file) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


class LazyDisk(LeavesOut):
    """A disk that syncs nothing until it is told to: what came there by a copy, say."""

    def __init__(self) -> None:
        super().__init__(lambda path: self.is_lazy)
        self.is_lazy = True


@EACH_CUT
def test_a_checkpoint_that_stays_because_the_state_is_the_same_is_made_durable(mode):
    disk = LazyDisk()
    save(disk, 2)
    disk.is_lazy = False
    assert newest_state(disk.after_power_cut("forget")) is None
    save(disk, 2)
    assert newest_state(disk.after_power_cut(mode)) == state_of("state at 2")


@EACH_CUT
def test_what_another_rank_has_stored_is_durable_under_its_name(mode):
    """Before rank 0 hears of it: a folder's names may be known to each host apart."""
    disk = FaultyStorage()
    with CheckpointWriter(disk, step=1, run_id=RUN_ID) as writer:
        for folder in ("", ".staging"):
            disk.sync_folder(folder)
        names = [*{leaf.file for leaf in leaves_of("x")}, *files_of("x")]
        entries = store_leaves(disk, writer.staging, leaves_of("x"), files_of("x"))
        after = disk.after_power_cut(mode)
        sizes = {entry.name: entry.nbytes for entry in entries}
        assert sizes == {n: after.stat(f"{writer.staging}/{n}").nbytes for n in names}
