"""What a step computes, held against numbers by hand: a resumed run would be wrong just alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from scenarios import metrics
from small_trainers import bits, small_trainer
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

IGNORED = -100
IDS = torch.arange(24).reshape(4, 6) % 7


def labels() -> torch.Tensor:
    """Labels of four texts, of which 5, 1, 3 and none count; the first of a row never does."""
    found = IDS.clone()
    for row, counted in enumerate((5, 1, 3, 0)):
        found[row, 1 + counted :] = IGNORED
    return found


TEXTS = [{"input_ids": ids, "labels": own} for ids, own in zip(IDS, labels(), strict=True)]


class Bigrams(nn.Module):
    """A language model that gives its own loss, the mean over the labels that count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids, labels):
        logits, wanted = self.table(input_ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        return {"loss": total / max(1, int((wanted != IGNORED).sum()))}


def by_hand() -> tuple[float, torch.Tensor]:
    """Return the loss of the whole batch, and the weights after one step on it."""
    model = Bigrams()
    loss = model(IDS, labels())["loss"]
    loss.backward()
    return loss.item(), (model.table.weight - model.table.weight.grad).detach()


@pytest.mark.parametrize("more", [{}, {"lanes": 2}], ids=["plain", "lanes"])
@pytest.mark.parametrize("size", [1, 2])
def test_each_label_counts_the_same_in_whatever_micro_batch_it_stands(size, more, tmp_path):
    settings = {"batch_size": 4, "micro_batch_size": size, "max_steps": 1, "logging_steps": 1}
    settings |= {"optim": "sgd", "learning_rate": 1.0, "sgd_momentum": 0.0, "weight_decay": 0.0}
    settings |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", **more}
    config = TrainerConfig(output_dir=str(tmp_path), **settings)
    trainer = Trainer(Bigrams(), config, TEXTS, display=NoDisplay())
    trainer.train()
    loss, weights = by_hand()
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(trainer.model.table.weight, weights, rtol=1e-5, atol=1e-7)


def test_equal_shares_of_these_micro_batches_would_be_another_loss():
    model, own = Bigrams(), labels()
    each = [model(ids[None], one[None])["loss"].item() for ids, one in zip(IDS, own, strict=True)]
    assert sum(each) / 4 != pytest.approx(by_hand()[0], rel=1e-2)


def test_a_line_of_the_log_has_the_learning_rate_of_its_own_step(tmp_path):
    settings = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_steps": 4}
    small_trainer(tmp_path, learning_rate=0.5, **settings).train()
    assert [line["learning_rate"] for line in metrics(tmp_path)] == [0.0, 0.25, 0.5, 0.25]


class Overflows(nn.Linear):
    """Its loss is infinite in one step."""

    def __init__(self, step: int) -> None:
        torch.manual_seed(3)
        super().__init__(6, 4)
        self.forward_passes = 0
        self.bad = step

    def forward(self, x):
        self.forward_passes += 1
        scale = float("inf") if self.forward_passes == self.bad else 0.01
        return super().forward(x) * scale


def test_a_step_that_the_scaler_skips_moves_neither_weights_nor_schedule(tmp_path):
    settings = {"lr_scheduler_type": "linear", "max_steps": 4, "fp16": True, "batch_size": 4}
    trainer = small_trainer(tmp_path, model=Overflows(2), learning_rate=1.0, **settings)
    seen, watch = {}, Callback()
    watch.on_step_end = lambda one: seen.update({one.progress.step: bits(one.model)})
    trainer.callbacks.append(watch)
    trainer.train()
    assert seen[1] == seen[2] != seen[3]
    assert [line["learning_rate"] for line in metrics(tmp_path)] == [1.0, 0.75, 0.75, 0.5]


LOSSES = {
    "no better": ([2.0] * 6, 0.0),
    "better by no more than the threshold": ([3.0, 2.5, 2.0, 1.5, 1.0, 0.5], 0.5),
    "no number": ([2.0, *[float("nan")] * 5], 0.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_stops_after_as_many_evaluations_without_a_gain_as_it_has_patience(name, tmp_path):
    losses, threshold = LOSSES[name]
    settings = {"early_stopping_patience": 2, "early_stopping_threshold": threshold}
    trainer = small_trainer(tmp_path, eval_steps=1, **settings)
    trainer.evaluate = lambda: {"eval_loss": losses[trainer.progress.step - 1]}
    result = trainer.train()
    assert (result.progress.step, "early stopping" in str(result.stopped_by)) == (3, True)
