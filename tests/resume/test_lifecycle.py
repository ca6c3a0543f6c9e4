"""Saves, starts and ends in unusual places: refused by name, or the same run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
import torch

from scenarios import metrics
from small_trainers import PAIRS, bits, small_model, small_trainer, steps_in
from unbroken.checkpoint import EXIT_STOPPED, Checkpointer
from unbroken.errors import ConfigError
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig


class SaveAtStep(Callback):
    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        setattr(self, hook, self.save)

    def save(self, trainer, *_) -> None:
        if trainer.progress.step == self.step:
            trainer.save_checkpoint()


@pytest.mark.parametrize("hook", ["on_step_end", "on_log", "on_evaluate"])
def test_a_save_asked_for_by_a_callback_holds_all_that_belongs_to_its_step(hook, tmp_path):
    settings = {"save_steps": None, "eval_steps": 1, "max_steps": 6}
    for folder, steps in (("cut", 4), ("cut", 6), ("whole", 6)):
        parts = {"callbacks": [SaveAtStep(3, hook)], "eval_dataset": PAIRS}
        trainer = small_trainer(tmp_path / folder, **settings | {"max_steps": steps}, trainer=parts)
        trainer.train(3 if (folder, steps) == ("cut", 6) else None)
    assert 3 in steps_in(tmp_path / "whole")
    steps = [line["step"] for line in metrics(tmp_path / "cut")]
    assert steps == [line["step"] for line in metrics(tmp_path / "whole")]


class Draws(Callback):
    def on_train_begin(self, trainer) -> None:
        torch.rand(1), np.random.rand()

    def on_save(self, trainer, checkpoint) -> None:
        torch.rand(1), np.random.rand()


def test_a_subclass_that_overrides_call_hears_of_every_hook(tmp_path):
    class Listening(Trainer):
        heard: ClassVar[set[str]] = set()

        def call(self, hook, *arguments):
            self.heard.add(hook)
            super().call(hook, *arguments)

    config = TrainerConfig(output_dir=str(tmp_path), max_steps=2, save_steps=1, eval_steps=1)
    loss, parts = torch.nn.CrossEntropyLoss(), {"eval_dataset": PAIRS, "display": NoDisplay()}
    Listening(small_model(), config, PAIRS, loss_fn=loss, **parts).train()
    hooks = {name for name in vars(Callback) if name.startswith("on_")}
    assert Listening.heard == hooks


def test_draws_at_the_start_and_in_saves_move_no_generator_of_the_run(tmp_path):
    states = []
    for folder, steps in (("a", (6,)), ("b", (2, 4, 6))):
        for last in steps:
            settings = {"max_steps": last, "lr_scheduler_type": "constant"}
            parts = {"callbacks": [Draws()]}
            trainer = small_trainer(tmp_path / folder, **settings, trainer=parts)
            trainer.train()
        states.append((bits(trainer.model), torch.get_rng_state().numpy().tobytes()))
    assert states[0] == states[1]


def test_never_on_a_trainer_that_has_trained_is_refused_before_anything_is_moved(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.train()
    with pytest.raises(ConfigError, match="make a new Trainer"):
        trainer.train("never")
    assert steps_in(tmp_path) == [0, 2, 4, 6]


def test_a_save_without_a_resume_never_mixes_two_runs(tmp_path):
    with Checkpointer(tmp_path, weight=torch.zeros(2)) as first:
        first.resume()
        first.save(5)
    with (
        Checkpointer(tmp_path, weight=torch.ones(2)) as second,
        pytest.raises(ConfigError, match="holds checkpoints that were not resumed"),
    ):
        second.save(2)


def test_lines_logged_between_two_saves_of_one_state_are_kept(tmp_path):
    with Checkpointer(tmp_path, weight=torch.zeros(2)) as first:
        first.resume()
        first.log({"step": 1})
        first.save(1)
        first.log({"step": 1, "note": "after"})
        first.save(1)
    with Checkpointer(tmp_path, weight=torch.zeros(2)) as second:
        second.resume()
    assert len(metrics(tmp_path)) == 2


def test_the_best_weights_are_never_saved_as_the_last(tmp_path):
    parts = {"eval_dataset": PAIRS}
    trainer = small_trainer(tmp_path, eval_steps=2, load_best_model_at_end=True, trainer=parts)
    trainer.train()
    with pytest.raises(ConfigError, match="best weights"):
        trainer.save_checkpoint()


def test_a_save_before_training_is_one_of_a_model_that_trains(tmp_path):
    model = small_model()
    model.eval()
    trainer = small_trainer(tmp_path, model=model)
    trainer.save_checkpoint()
    trainer.train()
    assert all(module.training for module in trainer.model.modules())


def test_a_run_is_the_same_after_a_change_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = small_trainer("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer.train()
    assert steps_in(tmp_path / "run") == [0, 2, 4, 6]


def test_the_step_at_which_a_callback_stops_is_logged(tmp_path):
    class Stop(Callback):
        def on_step_end(self, trainer) -> None:
            if trainer.progress.step == 3:
                trainer.stop()

    small_trainer(tmp_path, logging_steps=5, trainer={"callbacks": [Stop()]}).train()
    assert [line["step"] for line in metrics(tmp_path)] == [3]


def test_a_first_metric_that_is_no_number_is_never_the_best(tmp_path):
    trainer = small_trainer(tmp_path, eval_steps=1, max_steps=3)
    values = iter([float("nan"), 2.0, 3.0])
    trainer.evaluate = lambda: {"eval_loss": np.float32(next(values))}
    assert trainer.train().best_metric == 2.0


def test_an_optimizer_that_needs_a_closure_is_refused_at_once(tmp_path):
    model = small_model()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ConfigError, match="LBFGS"):
        small_trainer(tmp_path, model=model, trainer={"optimizer": lbfgs})


GROUP = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from small_trainers import small_trainer
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

class Stop(Callback):
    def on_micro_batch_end(self, trainer):
        if trainer.progress.step == 20:
            os.killpg(0, signal.SIGTERM)

settings = {"max_steps": 10_000, "save_steps": None, "dataloader_num_workers": 2}
small_trainer(sys.argv[2], trainer={"callbacks": [Stop()]}, **settings).train()
"""


def test_a_signal_to_the_whole_job_leaves_the_workers_their_last_batches(tmp_path):
    here = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-c", GROUP, here, str(tmp_path)]
    done = subprocess.run(
        command, start_new_session=True, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (EXIT_STOPPED, "")
    assert max(steps_in(tmp_path)) == 21
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
