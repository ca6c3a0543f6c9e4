"""Changes of optimizers, schedules, callbacks and metrics of one's own do what is meant."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.data import DataLoader

from scenarios import metrics
from small_trainers import PAIRS, small_model, small_trainer
from unbroken.checkpoint import Checkpointer, ResumePolicy
from unbroken.errors import DifferenceError
from unbroken.training import Callback


class WarmUp:
    """A schedule that is an object."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.steps)


def own(folder, make_schedule, lr: float = 0.1, **settings):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    parts = {"optimizer": optimizer, "scheduler": make_schedule(optimizer)}
    return small_trainer(folder, model=model, trainer=parts, **settings)


def rates(folder) -> list[float]:
    return [line["learning_rate"] for line in metrics(folder)]


CHANGES = {
    "an object in a LambdaLR": (lambda o: LambdaLR(o, WarmUp(4)), lambda o: LambdaLR(o, WarmUp(8))),
    "a cosine": (lambda o: CosineAnnealingLR(o, 10), lambda o: CosineAnnealingLR(o, 20)),
    "schedules in a chain": (
        lambda o: ChainedScheduler([ExponentialLR(o, 0.9), StepLR(o, 2)], optimizer=o),
        lambda o: ChainedScheduler([ExponentialLR(o, 0.8), StepLR(o, 2)], optimizer=o),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_named_schedule_goes_on_as_if_it_had_always_been_that(name, tmp_path):
    before, after = CHANGES[name]
    own(tmp_path / "changed", before, max_steps=3).train()
    own(tmp_path / "changed", after, max_steps=8, allow=["scheduler"]).train()
    own(tmp_path / "anew", after, max_steps=8).train()
    assert rates(tmp_path / "changed")[3:] == rates(tmp_path / "anew")[3:]
    assert rates(tmp_path / "changed")[:3] != rates(tmp_path / "anew")[:3]


def test_an_optimizer_that_is_not_loaded_follows_the_schedule_where_it_is(tmp_path):
    schedule = functools.partial(CosineAnnealingLR, T_max=10)
    own(tmp_path / "anew", schedule, max_steps=8).train()
    own(tmp_path / "run", schedule, max_steps=3).train()
    own(tmp_path / "run", schedule, max_steps=8, skip=["optimizer"]).train()
    assert rates(tmp_path / "run") == rates(tmp_path / "anew")


def test_another_kind_of_optimizer_follows_the_schedule_where_it_is(tmp_path):
    settings = {"warmup_steps": 2, "max_steps": 8}
    small_trainer(tmp_path, save_steps=3, **settings).train()
    (tmp_path / "checkpoint-8").rename(tmp_path.parent / f"{tmp_path.name}-later")
    (tmp_path / "checkpoint-6").rename(tmp_path.parent / f"{tmp_path.name}-late")
    before = rates(tmp_path)
    small_trainer(tmp_path, optim="sgd", skip=["optimizer"], **settings).train()
    assert rates(tmp_path) == before


def plateau(folder, rate: float = 1.0, patience: int = 0, **settings):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, threshold=1e9)
    parts = {"optimizer": optimizer, "scheduler": schedule, "eval_dataset": PAIRS}
    return small_trainer(folder, model=model, trainer=parts, eval_steps=1, **settings)


def rate_of(trainer) -> float:
    rate = trainer.optimizer.param_groups[0]["lr"]
    trainer.checkpointer.close()
    return rate


def test_a_schedule_that_follows_a_metric_keeps_the_rate_that_it_came_to(tmp_path):
    first = plateau(tmp_path, max_steps=4)
    first.train()
    came_to = rate_of(first)
    again = plateau(tmp_path, patience=3, allow=["scheduler"])
    again.load_checkpoint()
    assert rate_of(again) == came_to < 1.0
    scaled = plateau(tmp_path, rate=10.0, allow=["optimizer.lr"])
    scaled.load_checkpoint()
    assert rate_of(scaled) == 10 * came_to


def test_only_the_options_that_were_named_are_set_anew(tmp_path):
    def make(decay):
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=decay)
        parts = {"optimizer": optimizer, "scheduler": OneCycleLR(optimizer, 0.1, total_steps=20)}
        return small_trainer(tmp_path, model=model, trainer=parts, max_steps=6, allow=["optimizer"])

    make(0.0).train()
    same, other = make(0.0), make(0.5)
    for trainer in (same, other):
        trainer.load_checkpoint()
        trainer.checkpointer.close()
    groups = [trainer.optimizer.param_groups[0] for trainer in (same, other)]
    assert groups[0]["betas"] == groups[1]["betas"] != (0.95, 0.999)
    assert groups[1]["weight_decay"] == 0.5


def with_critic(folder, rate: float, **settings):
    critic = nn.Linear(2, 1)
    state = {"critic": critic, "critic_optimizer": torch.optim.Adam(critic.parameters(), lr=rate)}
    return small_trainer(folder, trainer={"state": state}, **settings), state["critic_optimizer"]


def test_a_second_optimizer_is_compared_and_changed_by_name(tmp_path):
    with_critic(tmp_path, 1e-3)[0].train()
    with pytest.raises(DifferenceError, match=r"optimizer\.critic_optimizer\.lr"):
        with_critic(tmp_path, 1e-4)[0].train()
    trainer, optimizer = with_critic(tmp_path, 1e-4, allow=["optimizer.critic_optimizer.lr"])
    trainer.train()
    assert optimizer.param_groups[0]["lr"] == 1e-4


def test_settings_that_only_make_an_optimizer_mean_nothing_to_one_of_ones_own(tmp_path):
    schedule = functools.partial(StepLR, step_size=100)
    own(tmp_path, schedule).train()
    report = own(tmp_path, schedule, learning_rate=5.0, weight_decay=1.0).train().resume_report
    assert {d.path: d.verdict for d in report.differences} == {
        "learning_rate": "harmless",
        "weight_decay": "harmless",
    }


def test_a_longer_schedule_is_told_though_it_still_warms_up(tmp_path):
    settings = {"warmup_steps": 8, "lr_scheduler_type": "cosine"}
    small_trainer(tmp_path / "b", max_steps=9, save_steps=2, **settings).train()
    for step in (9, 8, 6):
        (tmp_path / "b" / f"checkpoint-{step}").rename(tmp_path / f"later-{step}")
    report = small_trainer(tmp_path / "b", max_steps=90, **settings).train().resume_report
    assert [d.verdict for d in report.differences if d.path == "max_steps"] == ["changed"]


class Metrics(Callback):
    """Keeps a state."""

    def __init__(self) -> None:
        self.seen = 0

    def on_step_end(self, trainer) -> None:
        self.seen += 1

    def state_dict(self) -> dict:
        return {"seen": self.seen}

    def load_state_dict(self, state) -> None:
        self.seen = state["seen"]


def test_a_callback_with_a_state_comes_and_goes_by_name(tmp_path):
    follow = {"trainer": {"callbacks": [Metrics()]}}
    small_trainer(tmp_path, max_steps=2).train()
    with pytest.raises(DifferenceError, match="Metrics"):
        small_trainer(tmp_path, max_steps=4, **follow).train()
    settings = {"allow": ["callbacks"], "lr_scheduler_type": "linear"}
    assert small_trainer(tmp_path, max_steps=4, **follow, **settings).train().progress.step == 4
    assert small_trainer(tmp_path, max_steps=6, **settings).train().progress.step == 6


def judged(folder, metric: str, greater: bool, **settings):
    trainer = small_trainer(
        folder, eval_steps=1, metric_for_best_model=metric, greater_is_better=greater,
        trainer={"eval_dataset": PAIRS}, **settings,
    )  # fmt: skip
    trainer.evaluate = lambda: {"eval_loss": 9.0, "eval_accuracy": 0.5 + trainer.progress.step / 99}
    return trainer


def test_another_metric_begins_anew_to_look_for_the_best(tmp_path):
    judged(tmp_path, "eval_loss", greater=False, max_steps=3).train()
    again = judged(tmp_path, "eval_accuracy", greater=True, max_steps=8, early_stopping_patience=2)
    result = again.train()
    assert (result.progress.step, result.stopped_by) == (8, None)
    assert again.statistics.best_step == 8


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path):
    stopped = judged(tmp_path, "eval_loss", greater=False, max_steps=9, early_stopping_patience=2)
    assert stopped.train().progress.step == 3
    again = judged(tmp_path, "eval_loss", greater=False, max_steps=9, early_stopping_patience=99)
    assert again.train().progress.step == 9


def test_seed_and_accumulation_of_a_loader_can_be_changed_by_name(tmp_path):
    def run(**settings):
        loader = DataLoader(PAIRS, batch_size=4)
        return small_trainer(tmp_path, dataset=loader, micro_batch_size=4, **settings).train()

    run(max_steps=2, batch_size=8)
    assert run(max_steps=4, batch_size=4, allow=["batch_size"]).progress.samples == 16 + 8


def test_batch_size_can_be_changed_by_name_where_the_rest_of_an_epoch_is_left_out(tmp_path):
    small_trainer(tmp_path, max_steps=2, dataloader_drop_last=True).train()
    settings = {"batch_size": 12, "allow": ["batch_size"], "dataloader_drop_last": True}
    assert small_trainer(tmp_path, max_steps=4, **settings).train().progress.samples == 16 + 24


def test_a_save_by_hand_after_training_knows_the_machine_as_it_was_in_training(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_checkpoint()
    trainer.checkpointer.close()
    strict = small_trainer(tmp_path, max_steps=2, exact_resume="require")
    assert strict.train().resume_report.verdict == "exact"


def test_flags_that_a_loop_of_ones_own_sets_after_resuming_are_no_difference(tmp_path):
    def start():
        with Checkpointer(
            tmp_path, resume=ResumePolicy(exact_resume="require"), model=small_model()
        ) as c:
            report = c.resume()
            torch.use_deterministic_algorithms(True)
            c.save(report.step + 1)
            torch.use_deterministic_algorithms(False)
            return report

    start()
    assert start().verdict == "exact"


def test_long_values_are_shown_where_they_part(tmp_path):
    model = nn.Sequential(nn.RNN(6, 6, batch_first=True, bidirectional=True))
    other = nn.Sequential(nn.RNN(6, 6, batch_first=True, bidirectional=True, nonlinearity="relu"))
    with Checkpointer(tmp_path, model=model) as checkpointer:
        checkpointer.save(1)
    with Checkpointer(tmp_path, model=other) as again, pytest.raises(DifferenceError) as caught:
        again.resume()
    assert "relu" in str(caught.value)


class Average:
    """A state of one's own, with a number that training depends on."""

    def __init__(self, decay: float) -> None:
        self.decay, self.value = decay, 0.0

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state) -> None:
        self.value = state["value"]


def test_a_number_in_an_object_of_the_state_is_compared(tmp_path):
    def run(decay: float, **settings):
        return small_trainer(tmp_path, trainer={"state": {"average": Average(decay)}}, **settings)

    run(0.9).train()
    assert run(0.9).train().resume_report.verdict == "exact"
    with pytest.raises(DifferenceError, match=r"state\.average\.values\.decay"):
        run(0.99).train()
    assert run(0.99, allow=["state"]).train().resume_report.verdict == "changed"
