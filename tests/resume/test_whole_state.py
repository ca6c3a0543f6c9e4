"""What belongs to a run besides weights: callbacks, EMA, generators, open windows, best metric."""

from __future__ import annotations

import errno
import os
import signal

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fresh import run_fresh
from scenarios import outcome
from small_trainers import PAIRS, bits, small_model, small_trainer, steps_in
from unbroken.errors import CaptureError, DifferenceError, SaveError
from unbroken.storage import LocalStorage
from unbroken.testing import FaultyStorage
from unbroken.training import Callback


class Counter(Callback):
    """Draws from generators of its own and from the ambient ones."""

    def __init__(self, every: int) -> None:
        self.every, self.calls, self.noise = every, 0, []

    def on_step_end(self, trainer) -> None:
        self.calls += self.every
        if "torch" in trainer.checkpointer.objects:
            own = torch.rand((), generator=trainer.checkpointer.objects["torch"])
            self.noise.append((float(own), trainer.checkpointer.objects["numpy"].random()))
        self.noise.append((float(torch.rand(())), float(np.random.rand())))

    def state_dict(self) -> dict:
        return {"calls": self.calls, "noise": self.noise}

    def load_state_dict(self, state: dict) -> None:
        self.calls, self.noise = state["calls"], state["noise"]


class Ema(Callback):
    def __init__(self, averaged: AveragedModel) -> None:
        self.averaged = averaged

    def on_step_end(self, trainer) -> None:
        self.averaged.update_parameters(trainer.model)


class KillBeforeStep(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_micro_batch_end(self, trainer) -> None:
        if trainer.progress.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def rich_run(folder: str, kill_at: int | None) -> None:
    torch.set_num_threads(1)
    model = small_model()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    state = {
        "ema": averaged,
        "torch": torch.Generator().manual_seed(8),
        "numpy": np.random.default_rng(9),
    }
    callbacks = [Counter(1), Counter(10), Ema(averaged), KillBeforeStep(kill_at)]
    parts = {"state": state, "callbacks": callbacks}
    small_trainer(
        folder, model=model, eval_steps=2, trainer=parts | {"eval_dataset": PAIRS}
    ).train()


def test_callbacks_ema_and_generators_go_on_where_they_were(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_fresh(rich_run, str(whole), None) == 0
    assert run_fresh(rich_run, str(cut), 5) == -signal.SIGKILL
    assert run_fresh(rich_run, str(cut), None) == 0
    assert outcome(cut, 6) == outcome(whole, 6)
    assert len(outcome(whole, 6)["state"]["callbacks"]["1-Counter"]["state"]["noise"]) == 12


class SaveInWindow(Callback):
    """Saves inside the fourth step after some of its micro-batches, and is killed at once."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_micro_batch_end(self, trainer) -> None:
        if (trainer.progress.step, trainer.progress.pending) == (3, self.after):
            trainer.save_checkpoint()
            os.kill(os.getpid(), signal.SIGKILL)


def window_run(folder: str, after: int, size: int, without_gradients: bool) -> None:
    torch.set_num_threads(1)
    trainer = small_trainer(
        folder,
        batch_size=8,
        micro_batch_size=size,
        save_steps=100,
        trainer={"callbacks": [SaveInWindow(after)]},
    )
    trainer.checkpointer.objects["callbacks"] = {}
    if without_gradients:
        trainer.window.load_state_dict = lambda state: None
        trainer.window.shares = lambda micro_batches: [0.25] * len(micro_batches)
    trainer.train()


def whole_window(folder, size=2):
    assert run_fresh(window_run, str(folder), 0, size, False) == 0
    return outcome(folder, 6)


def after_a_kill_in_a_window(folder, after, size=2, without_gradients=False):
    assert run_fresh(window_run, str(folder), after, size, False) == -signal.SIGKILL
    assert steps_in(folder) == [0, 3]
    assert run_fresh(window_run, str(folder), 0, size, without_gradients) == 0
    return outcome(folder, 6)


@pytest.mark.parametrize(("size", "after"), [(2, 1), (2, 2), (2, 3), (2, 4), (8, 1)])
def test_a_save_forced_inside_an_accumulation_window_keeps_its_gradients(size, after, tmp_path):
    cut = after_a_kill_in_a_window(tmp_path / "cut", after, size)
    assert cut == whole_window(tmp_path / "whole", size)


def test_without_the_pending_gradients_the_bits_would_differ(tmp_path):
    lost = after_a_kill_in_a_window(tmp_path / "cut", 2, without_gradients=True)
    assert lost != whole_window(tmp_path / "whole")


def test_evaluation_changes_no_bit_of_the_training(tmp_path):
    plain, evaluated = (
        small_trainer(tmp_path / "a"),
        small_trainer(tmp_path / "b", eval_steps=1, trainer={"eval_dataset": PAIRS}),
    )
    plain.train()
    evaluated.train()
    assert bits(plain.model) == bits(evaluated.model)


def test_evaluation_leaves_each_submodule_in_its_mode(tmp_path):
    trainer = small_trainer(tmp_path, trainer={"eval_dataset": PAIRS})
    trainer.model[1].eval()
    trainer.evaluate()
    assert [module.training for module in trainer.model] == [True, False, True]


def scripted_trainer(folder, losses, **settings):
    trainer = small_trainer(folder, eval_steps=1, save_steps=100, **settings)
    trainer.evaluate = lambda: {"eval_loss": losses[trainer.progress.step - 1]}
    return trainer


def test_early_stopping_counts_its_patience_over_a_restart(tmp_path):
    losses = [3.0, 2.0, 2.5, 2.6, 2.7, 2.8]
    settings = {"early_stopping_patience": 3, "max_time": None}
    first = scripted_trainer(tmp_path, losses, **settings | {"max_steps": 4})
    first.train()
    second = scripted_trainer(tmp_path, losses, **settings)
    result = second.train()
    assert (result.progress.step, result.best_metric) == (5, 2.0)
    assert "early stopping" in result.stopped_by


def test_the_best_weights_are_in_the_model_at_the_end(tmp_path):
    trainer = scripted_trainer(
        tmp_path, [3.0, 1.0, 2.0, 2.0, 2.0, 2.0], load_best_model_at_end=True
    )
    seen = {}
    keep = Callback()
    keep.on_step_end = lambda t: seen.update({t.progress.step: bits(t.model)})
    trainer.callbacks.append(keep)
    trainer.train()
    assert bits(trainer.model) == seen[2] != seen[6]


def test_retention_never_takes_the_best_checkpoint(tmp_path):
    losses = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    trainer = scripted_trainer(tmp_path, losses, load_best_model_at_end=True, save_total_limit=1)
    trainer.train()
    assert steps_in(tmp_path) == [2, 6]
    assert small_trainer(tmp_path).load_checkpoint("best").step == 2


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    disk = FaultyStorage()
    small_trainer(tmp_path, max_steps=2, trainer={"storage": disk}).train()
    full = small_trainer(tmp_path, trainer={"storage": disk})
    full.load_checkpoint()
    disk.arm(fail_at=25, error=errno.ENOSPC)
    with pytest.raises(SaveError, match="No space left"):
        full.train()
    disk.repair()
    assert small_trainer(tmp_path, trainer={"storage": disk}).train().resume_report.step == 2


def test_state_that_cannot_be_stored_is_named_by_its_path(tmp_path):
    class Keeper(Callback):
        def state_dict(self) -> dict:
            return {"file": [LocalStorage]}

    with pytest.raises(CaptureError, match=r"callbacks\.0-Keeper\.file\.0"):
        small_trainer(tmp_path, trainer={"callbacks": [Keeper()]}).train()


def test_a_callback_taken_out_is_not_forgotten_silently(tmp_path):
    small_trainer(tmp_path, trainer={"callbacks": [Counter(1)]}, max_steps=2).train()
    with pytest.raises(DifferenceError, match="0-Counter"):
        small_trainer(tmp_path).train()
