"""Damage and missing files: what the host's own takes without a word, and ours walks past."""

from __future__ import annotations

import shutil
import struct
import zipfile

import pytest


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    place = len(data) * 3 // 4 if path.suffix != ".pt" else in_the_largest_entry(path, data)
    data[place] ^= 0x10
    path.write_bytes(data)


def in_the_largest_entry(path, data):
    entry = max(zipfile.ZipFile(path).infolist(), key=lambda one: one.file_size)
    name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
    return entry.header_offset + 30 + name + extra + entry.file_size // 2


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def killed(run, trainer):
    run(trainer=trainer, kill_at=13)
    return run.folder / "run"


@pytest.mark.stock
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_the_hosts_own_trains_on_flipped_bits(name, run, uninterrupted):
    flip_a_bit(killed(run, "stock") / "checkpoint-10" / name)
    resumed = run(trainer="stock", resume=True)
    assert resumed.status == 0
    assert resumed.digest != uninterrupted().digest


@pytest.mark.stock
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_the_hosts_own_crashes_on_a_file_cut_short(name, run):
    cut(killed(run, "stock") / "checkpoint-10" / name)
    assert run(trainer="stock", resume=True).status == 1


@pytest.mark.stock
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_the_hosts_own_begins_optimizer_and_schedule_anew_without_a_word(name, run):
    remove(killed(run, "stock") / "checkpoint-10" / name)
    resumed = run(trainer="stock", resume=True)
    assert resumed.first_step == 11
    assert resumed.rates["11"] < 0.0005  # the warm-up again
    assert "optimizer" not in resumed.text


@pytest.mark.stock
def test_the_hosts_own_goes_on_without_random_states(run, uninterrupted):
    remove(killed(run, "stock") / "checkpoint-10/rng_state.pth")
    resumed = run(trainer="stock", resume=True)
    assert (resumed.status, resumed.first_step) == (0, 11)
    assert resumed.digest != uninterrupted().digest


@pytest.mark.stock
def test_the_hosts_own_takes_weights_of_one_step_and_the_rest_of_another(run, uninterrupted):
    folder = killed(run, "stock")
    shutil.copy(folder / "checkpoint-5/model.safetensors", folder / "checkpoint-10")
    resumed = run(trainer="stock", resume=True)
    assert (resumed.status, resumed.first_step) == (0, 11)
    assert resumed.digest != uninterrupted().digest


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "trainer_state.json")


@pytest.mark.parametrize("harm", [flip_a_bit, cut, remove])
@pytest.mark.parametrize("name", FILES)
def test_ours_falls_back_and_is_the_same_run(name, harm, run, uninterrupted):
    harm(killed(run, "ours") / "checkpoint-10" / name)
    resumed = run(resume=True)
    assert resumed.first_step == 6
    assert any("not used: checkpoint-10" in line for line in resumed.report)
    assert resumed.bits == uninterrupted().bits


def test_ours_refuses_weights_of_another_step(run, uninterrupted):
    folder = killed(run, "ours")
    shutil.copy(folder / "checkpoint-5/model.safetensors", folder / "checkpoint-10")
    resumed = run()
    assert (resumed.first_step, resumed.bits) == (6, uninterrupted().bits)


def test_ours_refuses_a_damaged_checkpoint_that_is_named(run):
    flip_a_bit(killed(run, "ours") / "checkpoint-10/model.safetensors")
    resumed = run(start=str(run.folder / "run/checkpoint-10"))
    assert resumed.status == 1
    assert "CorruptCheckpointError" in resumed.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("harm", [flip_a_bit, cut, remove])
def test_a_stock_checkpoint_that_is_damaged_is_walked_past(name, harm, run, uninterrupted):
    harm(killed(run, "stock") / "checkpoint-10" / name)
    resumed = run()
    assert (resumed.first_step, resumed.digest) == (6, uninterrupted().digest)


def test_a_change_that_is_named_takes_effect_in_an_older_checkpoint_too(run):
    change = {"args": {"learning_rate": 0.0001, "weight_decay": 0.2}}
    allowed = {"allow": ["learning_rate", "weight_decay"]}
    folder = killed(run, "ours")
    shutil.copytree(folder, run.folder / "other")
    flip_a_bit(folder / "checkpoint-10/optimizer.safetensors")
    shutil.rmtree(run.folder / "other/checkpoint-10")
    resumed, expected = run(**change, **allowed), run("other", **change, **allowed)
    assert resumed.first_step == expected.first_step == 6
    assert (resumed.digest, resumed.rates) == (expected.digest, expected.rates)


RANKS = {"action": "train_on_ranks", "ranks": 2}
LAYOUTS = {
    "data parallel": {},
    "sharded": {"fsdp": {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_fall_back_together_and_are_the_same_run(layout, run, uninterrupted):
    args = {"num_train_epochs": 2, "save_steps": 4, "logging_steps": 2}
    case = {**RANKS, **LAYOUTS[layout], "args": args}
    run(kill_at=9, on_rank=1, **case)
    flip_a_bit(run.folder / "run/checkpoint-8/optimizer.rank1.safetensors")
    resumed = run(**case)
    assert resumed.first_step == 5, resumed.text
    assert any("not used: checkpoint-8" in line for line in resumed.report)
    assert resumed.bits == uninterrupted(**case).bits
