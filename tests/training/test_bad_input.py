"""Bad input: a clear error each, in the form *where: what: expected, found*, and nothing lost."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from torch import nn

from small_trainers import PAIRS, small_model, small_trainer, steps_in
from unbroken.errors import (
    ConfigError,
    DataError,
    LockHeldError,
    NewerFormatError,
    RunDirectoryError,
    SaveError,
    UnbrokenError,
)
from unbroken.language_model import TokenDataset
from unbroken.testing import FaultyStorage


def with_a_newer_checkpoint(folder):
    small_trainer(folder, max_steps=2).train()
    manifest = folder / "checkpoint-2" / "manifest.json"
    newer = json.loads(manifest.read_text())["manifest"]
    newer["version"] += 1
    rewrite(manifest, newer)
    small_trainer(folder).train()


def rewrite(path, body):
    """Write a manifest with its digest, as docs/format.md says."""
    import xxhash

    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = xxhash.xxh3_128(text.encode()).hexdigest()
    path.write_text(f'{{"digest":"{digest}","manifest":{text}}}\n')


def in_a_run_of_a_newer_version(folder):
    small_trainer(folder, max_steps=2).train()
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(
        json.dumps({**run, "version": 99}, sort_keys=True, separators=(",", ":"))
    )
    small_trainer(folder).train()


def in_a_folder_of_something_else(folder):
    folder.mkdir(exist_ok=True)
    (folder / "photo.jpg").write_bytes(b"jpg")
    small_trainer(folder).train()


def in_a_file(folder):
    (folder / "file").write_text("")
    small_trainer(folder / "file").train()


def below_a_file(folder):
    (folder / "file").write_text("")
    small_trainer(folder / "file" / "run").train()


def in_a_foreign_run_json(folder):
    (folder / "run.json").write_text('{"tool": "another"}')
    small_trainer(folder).train()


def without_rights(folder):
    disk = FaultyStorage(fail_at=1, error=errno.EACCES)
    small_trainer(folder, trainer={"storage": disk}).train()


def on_a_full_disk(folder):
    disk = FaultyStorage(fail_at=30, error=errno.ENOSPC, lasting=True)
    small_trainer(folder, trainer={"storage": disk}).train()


def while_another_trains(folder):
    first = small_trainer(folder)
    first.load_checkpoint("auto")
    try:
        small_trainer(folder).train()
    finally:
        first.checkpointer.close()


def a_model_without_a_loss(folder):
    trainer = small_trainer(folder)
    trainer._step_runner._loss_fn = None
    trainer.train()


def endless_epochs(folder):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from PAIRS

    small_trainer(folder, dataset=Stream(), max_steps=-1)


ROWS = {
    "empty data set": (lambda f: small_trainer(f, dataset=[]), DataError),
    "data set shorter than a batch": (lambda f: small_trainer(f, dataset=PAIRS[:7]), DataError),
    "no data set": (lambda f: small_trainer(f, dataset=None).train(), ConfigError),
    "missing text file": (
        lambda f: TokenDataset.from_files(f / "no.txt", block_size=8, cache=f), DataError,
    ),
    "unknown device": (lambda f: small_trainer(f, device="abacus"), ConfigError),
    "no such GPU": (lambda f: small_trainer(f, device="cuda:7"), ConfigError),
    "no activation checkpointing": (
        lambda f: small_trainer(f, gradient_checkpointing=True), ConfigError,
    ),
    "unknown schedule setting": (
        lambda f: small_trainer(f, lr_scheduler_kwargs={"speed": 1.0}), ConfigError,
    ),
    "unknown metric": (
        lambda f: small_trainer(
            f, eval_steps=1, metric_for_best_model="f1", trainer={"eval_dataset": PAIRS}
        ).train(),
        ConfigError,
    ),
    "no evaluation data": (lambda f: small_trainer(f, eval_steps=1).train(), ConfigError),
    "a name that is taken": (
        lambda f: small_trainer(f, trainer={"state": {"model": nn.Linear(1, 1)}}), ConfigError,
    ),
    "no loss": (a_model_without_a_loss, ConfigError),
    "an epoch of unknown length": (endless_epochs, ConfigError),
    "a folder of something else": (in_a_folder_of_something_else, RunDirectoryError),
    "a run.json of something else": (in_a_foreign_run_json, RunDirectoryError),
    "a file": (in_a_file, RunDirectoryError),
    "below a file": (below_a_file, RunDirectoryError),
    "a run of a newer version": (in_a_run_of_a_newer_version, RunDirectoryError),
    "a checkpoint of a newer format": (with_a_newer_checkpoint, NewerFormatError),
    "no rights": (without_rights, RunDirectoryError),
    "a full disk": (on_a_full_disk, SaveError),
    "another process": (while_another_trains, LockHeldError),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_gets_its_own_error_with_place_and_reason(row, tmp_path):
    action, error = ROWS[row]
    with pytest.raises(error) as raised:
        action(tmp_path)
    assert isinstance(raised.value, UnbrokenError)
    assert ": " in str(raised.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="Permission denied"):
        small_trainer(tmp_path).train()


@pytest.mark.parametrize("row", ["a checkpoint of a newer format", "another process"])
def test_what_was_saved_before_is_still_there(row, tmp_path):
    small_trainer(tmp_path, max_steps=2).train()
    with pytest.raises(UnbrokenError):
        ROWS[row][0](tmp_path)
    assert steps_in(tmp_path) == [0, 2]


def test_an_error_in_the_middle_of_training_leaves_the_run_resumable(tmp_path):
    model = small_model()
    broken = small_trainer(tmp_path, model=model, save_steps=1)
    broken.callbacks.append(type("Bad", (), {"on_step_end": lambda self, t: 1 / 0})())
    with pytest.raises((ZeroDivisionError, AttributeError)):
        broken.train()
    assert small_trainer(tmp_path).train().progress.step == 6
