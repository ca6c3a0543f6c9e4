"""A change that is named does what a user means by it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from scenarios import metrics
from small_trainers import PAIRS, bits, small_model, small_trainer
from unbroken.changes.rules import OWN_GENERATOR
from unbroken.data import GlobalOrder
from unbroken.errors import DifferenceError
from unbroken.training import Callback, TrainerConfig


class Indices:
    """A data set that notes which samples are read."""

    deterministic = True
    fingerprint = "the same"

    def __init__(self, n: int = 40) -> None:
        self.n, self.read = n, []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        self.read.append(index)
        return PAIRS[index % 40]


def plain(folder, **settings):
    """A model without dropout, whose steps are easily written by hand."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    settings = {"lr_scheduler_type": "constant", "optim": "adamw_torch", **settings}
    return small_trainer(folder, model=model, **settings)


def by_hand(rates: list[float], batch: int = 8) -> nn.Module:
    """The same training in plain PyTorch, with a learning rate for each step."""
    model = plain("unused").model
    groups = [[p for p in model.parameters() if (p.ndim >= 2) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], weight_decay=0.0)
    order = GlobalOrder(40, seed=42).samples(0, len(rates) * batch).reshape(-1, batch)
    for indices, rate in zip(order, rates, strict=True):
        x, y = (torch.stack(column) for column in zip(*(PAIRS[i] for i in indices), strict=True))
        nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_named_learning_rate_gives_the_bits_of_a_loop_written_by_hand(tmp_path):
    plain(tmp_path, max_steps=10).train()
    changed = plain(tmp_path, max_steps=30, learning_rate=0.003, allow=["learning_rate"])
    changed.train()
    assert bits(changed.model) == bits(by_hand([0.01] * 10 + [0.003] * 20))
    assert bits(changed.model) != bits(by_hand([0.01] * 11 + [0.003] * 19))


def test_another_batch_size_goes_on_with_the_next_sample(tmp_path):
    first, second = Indices(), Indices()
    small_trainer(tmp_path, dataset=first, max_steps=3).train()
    small_trainer(
        tmp_path,
        dataset=second,
        max_steps=6,
        batch_size=4,
        micro_batch_size=2,
        allow=["batch_size"],
    ).train()
    order = GlobalOrder(40, seed=42).samples(0, 3 * 8 + 3 * 4).tolist()
    assert first.read + second.read == order


@pytest.mark.parametrize("first", [3, 5])
def test_after_a_change_of_the_batch_size_the_run_resumes_again_and_again(first, tmp_path):
    """Steps of the new size are counted from where it changed, at each later start, too."""
    read = []
    settings = {"batch_size": 8, "micro_batch_size": 4}
    for steps in (first, first + 1, first + 2, first + 4):
        data = Indices()
        small_trainer(tmp_path, dataset=data, max_steps=steps, save_steps=1, **settings).train()
        read += data.read
        settings = {"batch_size": 12, "micro_batch_size": 4, "allow": ["batch_size"]}
    assert read == GlobalOrder(40, seed=42).samples(0, first * 8 + 4 * 12).tolist()


def test_epochs_are_counted_in_samples_when_the_batch_size_changed(tmp_path):
    small_trainer(tmp_path, max_steps=3).train()
    settings = {"max_steps": -1, "num_train_epochs": 1, "batch_size": 4, "allow": ["batch_size"]}
    result = small_trainer(tmp_path, **settings).train()
    assert (result.progress.step, result.progress.samples) == (3 + 4, 40)
    assert result.progress.epoch == 1.0
    again = small_trainer(tmp_path, **{**settings, "num_train_epochs": 2}).train()
    assert (again.progress.step, again.progress.samples) == (7 + 10, 80)


def test_another_seed_gives_the_order_of_that_seed_from_the_same_position(tmp_path):
    small_trainer(tmp_path, dataset=Indices(), max_steps=2).train()
    data = Indices()
    small_trainer(tmp_path, dataset=data, max_steps=4, seed=1, allow=["seed"]).train()
    assert data.read == GlobalOrder(40, seed=1).samples(16, 32).tolist()


def test_another_data_set_is_read_from_the_same_position(tmp_path):
    small_trainer(tmp_path, dataset=Indices(), max_steps=2).train()
    longer = Indices(64)
    with pytest.raises(DifferenceError, match=r"data\.length: stored 40, now 64"):
        small_trainer(tmp_path, dataset=longer, max_steps=4).train()
    small_trainer(tmp_path, dataset=longer, max_steps=4, allow=["data"]).train()
    assert longer.read == GlobalOrder(64, seed=42).samples(16, 32).tolist()


def frozen_trainer(folder, frozen: bool, **settings):
    model = small_model()
    model[0].requires_grad_(not frozen)
    return small_trainer(folder, model=model, **settings)


def test_a_parameter_frozen_by_name_stays_and_the_others_keep_their_moments(tmp_path):
    frozen_trainer(tmp_path, frozen=False, max_steps=3).train()
    now = frozen_trainer(tmp_path, frozen=True, max_steps=3, allow=["model.frozen"])
    now.train()
    before, step = bits(now.model), now.optimizer.state[now.model[2].weight]["step"].item()
    later = frozen_trainer(tmp_path, frozen=True, max_steps=6, allow=["model.frozen"])
    later.train()
    assert step == 3
    assert bits(later.model)["0.weight"] == before["0.weight"]
    assert bits(later.model)["2.weight"] != before["2.weight"]


def test_a_parameter_unfrozen_by_name_trains_with_moments_of_its_own(tmp_path):
    frozen_trainer(tmp_path, frozen=True, max_steps=3).train()
    now = frozen_trainer(tmp_path, frozen=False, max_steps=5, allow=["model"])
    now.train()
    steps = [now.optimizer.state[now.model[i].weight]["step"].item() for i in (0, 2)]
    assert steps == [2, 5]


def scheduled(folder, gamma: float, **settings):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
        torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=gamma),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedulers, milestones=[2])
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    return small_trainer(folder, model=model, trainer=parts, **settings)


def test_a_schedule_of_ones_own_is_built_anew_at_the_step_where_the_run_is(tmp_path):
    scheduled(tmp_path / "changed", 0.5, max_steps=5).train()
    scheduled(tmp_path / "changed", 0.1, max_steps=9, allow=["scheduler"]).train()
    scheduled(tmp_path / "anew", 0.1, max_steps=9).train()
    rates = [
        [line["learning_rate"] for line in metrics(tmp_path / name)] for name in ("changed", "anew")
    ]
    assert rates[0][5:] == rates[1][5:]
    assert rates[0][4] != rates[1][4]


FALLING = ["linear", "cosine", "polynomial", "cosine_with_min_lr"]


@pytest.mark.parametrize("schedule", FALLING)
def test_more_steps_of_a_falling_schedule_are_one_decision_told_in_one_sentence(schedule, tmp_path):
    settings = {"lr_scheduler_type": schedule, "any_length": False}
    small_trainer(tmp_path, max_steps=15, **settings).train()
    with pytest.raises(DifferenceError, match="max_steps: stored 15, now 30") as refused:
        small_trainer(tmp_path, max_steps=30, **settings).train()
    assert [d.path for d in refused.value.differences] == ["max_steps"]
    sentence = r"step 16 has the learning rate 0\.0\d+ in a run of 30 steps, and \S+ in one of 15"
    assert re.search(sentence, str(refused.value))
    assert "allow=['max_steps']" in refused.value.hint


@pytest.mark.parametrize("name", ["max_steps", "schedule"])
def test_once_it_is_named_the_schedule_is_that_of_the_longer_run(name, tmp_path):
    kept = {"any_length": False, "lr_scheduler_type": "cosine"}
    small_trainer(tmp_path / "longer", max_steps=3, **kept).train()
    report = small_trainer(tmp_path / "longer", max_steps=6, allow=[name], **kept).train()
    assert report.resume_report.verdict == "changed"
    assert small_trainer(tmp_path / "longer", max_steps=6, **kept).train().progress.step == 6
    small_trainer(tmp_path / "anew", max_steps=6, **kept).train()
    rates = [[n["learning_rate"] for n in metrics(tmp_path / of)] for of in ("longer", "anew")]
    assert rates[0][3:] == rates[1][3:]


HARMLESS_LENGTHS = {
    "constant": {"lr_scheduler_type": "constant"},
    "warm-up in steps": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "the root of the step": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
}


@pytest.mark.parametrize("name", HARMLESS_LENGTHS)
def test_more_steps_are_harmless_where_no_learning_rate_depends_on_them(name, tmp_path):
    settings = {**HARMLESS_LENGTHS[name], "any_length": False}
    small_trainer(tmp_path, max_steps=4, **settings).train()
    report = small_trainer(tmp_path, max_steps=8, **settings).train().resume_report
    assert [(d.path, d.verdict) for d in report.differences] == [("max_steps", "harmless")]
    assert report.verdict == "exact"


def test_a_share_of_the_steps_for_warm_up_and_more_epochs_are_told_the_same(tmp_path):
    shares = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5, "any_length": False}
    epochs = {"max_steps": -1, "save_steps": 2, **shares}
    small_trainer(tmp_path, num_train_epochs=1, **epochs).train()
    (tmp_path / "checkpoint-5").rename(tmp_path / "later-5")
    (tmp_path / "checkpoint-4").rename(tmp_path / "later-4")
    with pytest.raises(DifferenceError, match=r"num_train_epochs: stored 1.*: another schedule"):
        small_trainer(tmp_path, num_train_epochs=3, **epochs).train()


def test_a_run_that_is_over_before_the_new_end_trains_nothing_and_needs_no_name(tmp_path):
    small_trainer(tmp_path, max_steps=6, any_length=False).train()
    shorter = small_trainer(tmp_path, max_steps=4, any_length=False).train()
    assert shorter.progress.step == 6
    assert [d.verdict for d in shorter.resume_report.differences] == ["harmless"]


def test_required_exactness_refuses_what_is_only_equivalent(tmp_path):
    small_trainer(tmp_path, max_steps=4).train()
    strict = {"max_steps": 4, "exact_resume": "require", "micro_batch_size": 4}
    with pytest.raises(DifferenceError, match=r"micro_batch_size.*|exact_resume"):
        small_trainer(tmp_path, **strict).train()
    named = small_trainer(tmp_path, **strict, allow=["micro_batch_size"]).train()
    assert named.resume_report.verdict == "equivalent"


def test_required_exactness_refuses_more_steps_of_a_falling_schedule(tmp_path):
    small_trainer(tmp_path, max_steps=4).train()
    with pytest.raises(DifferenceError, match="max_steps"):
        small_trainer(tmp_path, max_steps=8, exact_resume="require", any_length=False).train()


def test_an_error_lists_every_difference_and_how_to_go_on(tmp_path):
    small_trainer(tmp_path, max_steps=4).train()
    with pytest.raises(DifferenceError) as caught:
        small_trainer(tmp_path, max_steps=4, learning_rate=1.0, seed=1).train()
    told = "\n".join([str(caught.value), *caught.value.__notes__])
    assert "seed: stored 42, now 1" in told
    assert "go on with the new value: allow=['learning_rate', 'seed']; keep" in told
    assert {d.path for d in caught.value.differences} >= {"seed", "learning_rate"}


class OwnGenerator(Indices):
    """A data set whose randomness nobody can key."""

    fingerprint = None
    deterministic = False

    def __getitem__(self, index: int):
        x, y = PAIRS[index]
        self.noise = getattr(self, "noise", torch.Generator().manual_seed(1))
        return x + torch.randn(6, generator=self.noise), y


def test_a_data_set_with_a_generator_of_its_own_is_not_covered_or_refused(tmp_path):
    def start(folder, **settings):
        settings = {"lr_scheduler_type": "constant", **settings}
        return small_trainer(folder, dataset=OwnGenerator(), **settings)

    lines, strict = [], {"exact_resume": "require"}
    trainer = start(tmp_path, max_steps=2)
    trainer.checkpointer._tell_user = lines.append
    trainer.train()
    assert [line for line in lines if "a generator of its own" in line] == [
        f"data.repeatable: not covered: {OWN_GENERATOR}"
    ]
    with pytest.raises(DifferenceError, match=r"data\.repeatable: not covered: .*not the same"):
        start(tmp_path, **strict).train()
    with pytest.raises(DifferenceError, match=r"data\.repeatable: not covered"):
        start(tmp_path / "fresh", **strict).train()
    report = start(tmp_path).train().resume_report
    assert (report.step, report.verdict) == (2, "not covered")
    assert report.lines()[0].endswith("(step 2): not known to be exact")
    assert report.lines()[1] == f"data.repeatable: not covered: {OWN_GENERATOR}"
    named = start(tmp_path, allow=("data",), max_steps=8, **strict)
    assert named.train().progress.step == 8


def test_evaluation_data_with_a_generator_of_their_own_matter_where_they_steer(tmp_path):
    data = {"trainer": {"eval_dataset": OwnGenerator()}, "eval_steps": 2}
    for schedule, verdict in (("constant", "exact"), ("reduce_lr_on_plateau", "not covered")):
        settings = {**data, "lr_scheduler_type": schedule}
        small_trainer(tmp_path / schedule, max_steps=2, **settings).train()
        again = small_trainer(tmp_path / schedule, max_steps=4, **settings)
        assert again.train().resume_report.verdict == verdict


CHOOSES = {
    "the best is loaded at the end": {"load_best_model_at_end": True},
    "patience": {"early_stopping_patience": 9},
}


class Stopper(Callback):
    def on_evaluate(self, trainer, metrics) -> None:
        if metrics["eval_loss"] < 0:
            trainer.stop("enough")


def evaluated(folder, data, *, max_steps=4, **settings):
    parts = {"eval_dataset": data, **settings.pop("trainer", {})}
    settings = {"lr_scheduler_type": "constant", "eval_steps": 2, **settings}
    return small_trainer(folder, max_steps=max_steps, trainer=parts, **settings)


@pytest.mark.parametrize("settings", [*CHOOSES.values(), {"trainer": {"callbacks": [Stopper()]}}])
def test_other_evaluation_data_that_choose_are_never_called_exact(settings, tmp_path):
    for folder, data, verdict in (("same", PAIRS, "exact"), ("other", PAIRS[:8], "equivalent")):
        evaluated(tmp_path / folder, PAIRS, max_steps=2, **settings).train()
        report = evaluated(tmp_path / folder, data, **settings).train().resume_report
        assert (report.step, report.verdict) == (2, verdict)
        told = [one.verdict for one in report.differences if one.path == "eval_data.length"]
        assert told == ([] if folder == "same" else ["equivalent"])


def test_other_evaluation_data_that_choose_nothing_are_harmless(tmp_path):
    evaluated(tmp_path, PAIRS, max_steps=2).train()
    assert evaluated(tmp_path, PAIRS[:8]).train().resume_report.verdict == "exact"


def test_other_evaluations_under_a_schedule_of_the_users_that_follows_them_are_refused(tmp_path):
    def start(data, **settings):
        model = torch.nn.Linear(6, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        own = {"optimizer": optimizer, "scheduler": plateau}
        return evaluated(tmp_path, data, model=model, trainer=own, **settings)

    start(PAIRS, max_steps=2).train()
    with pytest.raises(DifferenceError, match=r"eval_data\.length: .* steer the learning rate"):
        start(PAIRS[:8]).train()
    with pytest.raises(DifferenceError, match="eval_batch_size"):
        start(PAIRS, eval_batch_size=3).train()


def test_arguments_from_a_file_with_one_value_changed_are_used_and_told(tmp_path):
    """The second example of a well-known guide, which loads JSON and lowers the learning rate."""
    file = tmp_path / "training_config.json"
    small_trainer(tmp_path / "run", max_steps=4).config.to_file(file)
    small_trainer(tmp_path / "run", max_steps=4).train()
    settings = json.loads(file.read_text())
    settings |= {"learning_rate": 1e-5, "max_steps": 8, "allow": ["learning_rate"]}
    settings["resume_from_checkpoint"] = str(tmp_path / "run" / "checkpoint-4")
    config = TrainerConfig.from_dict(settings)
    assert config.learning_rate == 1e-5
    fields = {name: value for name, value in config.to_dict().items() if name != "output_dir"}
    report = small_trainer(tmp_path / "run", **fields).train().resume_report
    assert report.step == 4
    assert "learning_rate: stored 0.01, now 1e-05: changed" in "\n".join(report.lines())
    assert metrics(tmp_path / "run")[4]["learning_rate"] == pytest.approx(1e-5 * 4 / 8)


def test_a_callback_without_a_state_may_come_and_go(tmp_path):
    small_trainer(tmp_path, max_steps=2).train()
    more = small_trainer(tmp_path, max_steps=4, trainer={"callbacks": [Callback()]})
    assert more.train().progress.step == 4
