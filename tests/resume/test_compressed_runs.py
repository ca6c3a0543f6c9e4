"""Runs whose tensors are kept compressed are the same runs, and every command reads them."""

from __future__ import annotations

import shutil
import signal
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fresh import run_fresh
from scenarios import CUTS, ArmedCompressedStorage, Scenario, outcome, train
from small_trainers import bits, small_trainer
from unbroken import Checkpointer, ConfigError, KeepPolicy
from unbroken.cli.main import main
from unbroken.storage import CompressedStorage, LocalStorage

SCENARIO = Scenario()
WIDE = 1 << 16  # the model's file has 2.6 MB
SETTINGS = {"max_steps": 4, "save_steps": 2, "save_compressed": True}


def is_compressed(checkpoint) -> bool:
    plain, packed = (checkpoint / f"model.safetensors{end}" for end in ("", ".planes"))
    assert plain.exists() != packed.exists()
    return packed.exists()


# A run that is killed


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What the run ends with that nobody touched, and that compresses nothing."""
    folder = tmp_path_factory.mktemp("plain")
    assert run_fresh(train, SCENARIO, str(folder), 15) == 0
    return outcome(folder)


@pytest.mark.parametrize("cut", ["mid-epoch", "inside a save"])
def test_a_killed_run_ends_with_the_bits_of_the_plain_one(cut, plain, tmp_path):
    cut = CUTS[cut]
    begin = (SCENARIO, str(tmp_path), cut.save_steps)
    assert run_fresh(train, *begin, cut, None, ArmedCompressedStorage) == -signal.SIGKILL
    assert is_compressed(tmp_path / f"checkpoint-{cut.checkpoint}")
    assert run_fresh(train, *begin, None, None, ArmedCompressedStorage) == 0
    assert is_compressed(tmp_path / "checkpoint-15")
    assert outcome(tmp_path) == plain


# Settings


def trained(folder, **settings):
    """Train a model that is wide enough to be compressed; return its bits."""
    model = nn.Sequential(nn.Linear(6, WIDE), nn.ReLU(), nn.Linear(WIDE, 4))
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    trainer = small_trainer(folder, model=model, **{**SETTINGS, **settings})
    report = trainer.train().resume_report
    return bits(trainer.model), report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with compressed checkpoints, and the bits of its model."""
    folder = tmp_path_factory.mktemp("run")
    return folder, trained(folder)[0]


def test_the_setting_compresses_and_changes_no_bit(run, tmp_path):
    folder, model = run
    assert is_compressed(folder / "checkpoint-4")
    assert trained(tmp_path, save_compressed=False)[0] == model
    assert not is_compressed(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("now", [True, False])
def test_the_setting_may_change_in_a_run(now, run, tmp_path):
    trained(tmp_path, save_compressed=not now)
    shutil.rmtree(tmp_path / "checkpoint-4")
    model, report = trained(tmp_path, save_compressed=now)
    assert (report.step, model) == (2, run[1])
    assert [is_compressed(tmp_path / f"checkpoint-{step}") for step in (2, 4)] == [not now, now]


def test_a_checkpointer_takes_the_storage(tmp_path):
    model = nn.Linear(600, 600)
    for _ in range(2):
        storage = CompressedStorage(LocalStorage(tmp_path))
        with Checkpointer(storage, model=model) as checkpointer:
            step = checkpointer.resume().step
            checkpointer.save(step + 1)
    assert step == 1
    assert is_compressed(tmp_path / "checkpoint-2")


def test_a_checkpoint_that_was_copied_elsewhere_is_whole(run, tmp_path, capsys):
    shutil.copytree(run[0] / "checkpoint-4", tmp_path / "copy")
    assert main(["verify", str(tmp_path / "copy")]) == 0
    model, report = trained(tmp_path / "new", resume_from_checkpoint=str(tmp_path / "copy"))
    assert (report.step, model) == (4, run[1])


def test_a_branch_is_compressed_too(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    model, report = trained(tmp_path / "run", branch="again", resume_from_checkpoint=2)
    branch = tmp_path / "run" / "branches" / "again"
    assert (report.step, model) == (2, run[1])
    assert [is_compressed(branch / f"checkpoint-{step}") for step in (2, 4)] == [True, True]


def test_what_is_not_trained_is_linked_and_old_checkpoints_are_removed(tmp_path):
    model = nn.Sequential(nn.Linear(600, 600).requires_grad_(False), nn.Linear(600, 600))
    storage = CompressedStorage(LocalStorage(tmp_path))
    with Checkpointer(storage, model=model, keep=KeepPolicy(last=2)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step)
    frozen = [path.stat().st_ino for path in tmp_path.rglob("model-frozen.safetensors.planes")]
    trained = [path.stat().st_ino for path in tmp_path.rglob("model-trained.safetensors.planes")]
    assert [len(frozen), len(set(frozen)), len(set(trained))] == [2, 1, 2]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]


# The command line


@pytest.mark.parametrize(
    ("command", "told"), [("ls", "   4  20"), ("show", "checkpoint-4"), ("verify", "4: intact")]
)
def test_the_commands_read_a_compressed_run(command, told, run, capsys):
    assert main([command, str(run[0])]) == 0
    assert told in capsys.readouterr().out


def test_diff_finds_no_difference_to_a_plain_run(run, tmp_path, capsys):
    trained(tmp_path, save_compressed=False)
    both = [str(folder / "checkpoint-4") for folder in (run[0], tmp_path)]
    assert main(["diff", *both, "--values"]) in (0, 1)
    assert "model." not in capsys.readouterr().out


def test_damage_is_found_and_walked_past(run, tmp_path, capsys):
    shutil.copytree(run[0], tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-4" / "model.safetensors.planes"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(tmp_path / "run")]) == 10
    assert "compressed file is damaged" in capsys.readouterr().out
    model, report = trained(tmp_path / "run")
    assert (report.step, model) == (2, run[1])


def test_export_writes_what_other_programs_read(run, tmp_path, capsys):
    with pytest.raises(SafetensorError):
        load_file(run[0] / "checkpoint-4" / "model.safetensors.planes")
    assert main(["export", str(run[0]), str(tmp_path / "out")]) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.numpy().tobytes() for name, tensor in found.items()} == run[1]


# Without the library


@pytest.fixture
def without_zstd(monkeypatch):
    for name in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)


def test_the_setting_is_refused_without_the_library(without_zstd, tmp_path):
    with pytest.raises(ConfigError, match="compressed files need"):
        small_trainer(tmp_path / "run", **SETTINGS)


def test_a_compressed_run_is_never_begun_anew_without_the_library(run, tmp_path, without_zstd):
    shutil.copytree(run[0], tmp_path / "run")
    with pytest.raises(ConfigError, match="compressed files need"):
        trained(tmp_path / "run", save_compressed=False)
    assert is_compressed(tmp_path / "run" / "checkpoint-4")


def test_verify_says_what_to_install(run, without_zstd, capsys):
    assert main(["verify", str(run[0])]) == ConfigError.exit_code
    assert "pip install 'unbroken[zstd]'" in capsys.readouterr().err
