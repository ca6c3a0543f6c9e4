"""A changed setting is never taken silently: it passes as harmless, is named, or is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from scenarios import metrics
from small_trainers import PAIRS, bits, small_model, small_trainer
from unbroken.errors import DifferenceError
from unbroken.training import Trainer, TrainerConfig
from unbroken.training.config_rules import RULES

CHANGES = {
    "learning_rate": 0.02,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 9,
    "max_grad_norm": 0.01,
    "batch_size": 4,
    "seed": 1,
    "shuffle": False,
    "optim": "sgd",
    "bf16": True,
    "samples_per_epoch": 32,
}


@pytest.fixture
def run(tmp_path):
    train(tmp_path, max_steps=4)
    return tmp_path


def train(folder, **settings):
    trainer = small_trainer(folder, **{"max_steps": 8, "weight_decay": 0.1, **settings})
    return trainer, trainer.train()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_training_is_refused_with_both_values(name, run):
    with pytest.raises(DifferenceError, match=rf"{name}: .*{CHANGES[name]}"):
        train(run, **{name: CHANGES[name]})
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "name",
    [
        *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("lr_scheduler_type", "max_grad_norm", "bf16"),
    ],
)
def test_a_named_change_takes_effect(name, run, tmp_path_factory):
    same = tmp_path_factory.mktemp("same")
    shutil.copytree(run, same, dirs_exist_ok=True)
    kept, _ = train(same)
    trainer, result = train(run, **{name: CHANGES[name]}, allow=[name])
    assert bits(trainer.model) != bits(kept.model)
    assert result.resume_report.differences[0].path == name


def test_a_new_learning_rate_is_that_of_the_new_schedule_at_the_same_step(run, tmp_path_factory):
    train(run, learning_rate=0.02, allow=["learning_rate"])
    anew = tmp_path_factory.mktemp("anew")
    train(anew, learning_rate=0.02)
    changed = {line["step"]: line["learning_rate"] for line in metrics(run)}
    fresh = {line["step"]: line["learning_rate"] for line in metrics(anew)}
    assert [changed[step] for step in range(5, 9)] == [fresh[step] for step in range(5, 9)]


def test_a_named_change_is_made_once_and_holds_for_the_next_resume(run):
    train(run, learning_rate=0.02, allow=["learning_rate"], max_steps=6)
    _, result = train(run, learning_rate=0.02)
    paths = [difference.path for difference in result.resume_report.differences]
    assert paths == ["max_steps"]


def test_moments_are_kept_when_the_learning_rate_changes(run):
    kept, _ = train(run, max_steps=4)
    changed, _ = train(run, learning_rate=0.02, allow=["learning_rate"], max_steps=4)
    moments = [t.optimizer.state[t.model[0].weight]["exp_avg"] for t in (kept, changed)]
    assert moments[0].numpy().tobytes() == moments[1].numpy().tobytes()
    assert bool(moments[0].any())


def test_another_optimizer_is_refused_even_if_named_unless_its_state_is_not_loaded(run):
    with pytest.raises(DifferenceError, match=r'optim: .*skip=\["optimizer"\]'):
        train(run, optim="sgd", allow=["optim"])
    with pytest.raises(DifferenceError, match="optim"):
        train(run, optim="sgd", skip=["scheduler"])
    assert train(run, optim="sgd", allow=["optim"], skip=["optimizer"])[1].progress.step == 8


def test_harmless_changes_pass_and_are_told(run):
    harmless = {"save_steps": 3, "logging_steps": 2, "dataloader_num_workers": 2}
    _, result = train(run, max_steps=4, **harmless)
    verdicts = {d.path: d.verdict for d in result.resume_report.differences}
    assert set(verdicts) == {"save_steps", "logging_steps", "dataloader_num_workers"}
    assert set(verdicts.values()) == {"harmless"}


def test_another_split_into_micro_batches_is_equivalent_and_told(run):
    _, result = train(run, micro_batch_size=4)
    found = {d.path: d.verdict for d in result.resume_report.differences}
    assert found["micro_batch_size"] == "equivalent"
    assert result.progress.step == 8


def test_evaluations_that_steer_the_learning_rate_are_no_harmless_cadence(tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 4}
    parts = {"trainer": {"eval_dataset": PAIRS}}
    small_trainer(tmp_path, eval_steps=1, **settings, **parts).train()
    with pytest.raises(DifferenceError, match="eval_steps"):
        small_trainer(tmp_path, eval_steps=2, **settings, **parts).train()


def test_the_differences_stand_in_the_history(run):
    train(run, learning_rate=0.02, allow=["learning_rate"])
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "started"][-1]
    assert last["differences"][0]["path"] == "learning_rate"


def test_every_setting_has_a_rule():
    of_the_start = {"allow", "skip", "exact_resume", "resume_from_checkpoint"}
    of_the_start |= {"read_from", "ddp_timeout"}
    assert set(TrainerConfig().to_dict()) - set(RULES) == of_the_start


def with_dropout(folder, rate, **settings):
    parts = {"settings": {"model": {"dropout": rate}}}
    return small_trainer(folder, trainer=parts, max_steps=4, **settings).train()


def test_a_changed_setting_of_the_model_is_refused_unless_it_or_its_group_is_named(tmp_path):
    with_dropout(tmp_path, 0.2)
    with pytest.raises(DifferenceError, match=r"model\.dropout: stored 0\.2, now 0\.3"):
        with_dropout(tmp_path, 0.3)
    assert with_dropout(tmp_path, 0.3, allow=["model.dropout"]).resume_report.step == 4
    assert with_dropout(tmp_path, 0.3, allow=["model"]).resume_report.step == 4


def test_another_number_of_threads_is_told_as_equivalent(run):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        _, result = train(run)
    finally:
        torch.set_num_threads(before)
    found = {d.path: d.verdict for d in result.resume_report.differences}
    assert found["environment.num_threads"] == "equivalent"


def test_another_dropout_in_the_code_is_noticed_by_what_the_model_prints(run):
    model = small_model()
    model[1].p = 0.3
    with pytest.raises(DifferenceError, match=r"model\.layer\.1: stored Dropout\(p=0\.2"):
        small_trainer(run, model=model, max_steps=8, weight_decay=0.1).train()


def test_the_whole_table_shows_what_is_the_same_too(run):
    trainer, _ = train(run, save_steps=3)
    rows = {row.path: row for row in trainer.resume_report.table}
    assert (rows["learning_rate"].stored, rows["learning_rate"].now) == (0.01, 0.01)
    same = ("learning_rate", "data.length", "model.class", "environment.torch")
    assert {rows[path].verdict for path in same} == {"same"}
    assert rows["save_steps"].verdict == "harmless"


def test_no_path_is_in_the_table_twice_and_none_of_the_same_is_a_difference(run):
    trainer, _ = train(run, batch_size=4, allow=["batch_size"])
    paths = [row.path for row in trainer.resume_report.table]
    assert len({*paths}) == len(paths)
    assert "same" not in {row.verdict for row in trainer.resume_report.differences}


OTHER = {
    "harmless": {
        "logging_steps": 3, "logging_minutes": 5.0, "log_data_digest": True, "eval_steps": 3,
        "eval_minutes": 5.0, "eval_batch_size": 4, "save_steps": 3, "save_minutes": 5.0,
        "save_at_start": False, "save_total_limit": 3, "keep_every_n_steps": 3, "max_time": 3600.0,
        "confirm_stops": True, "verify_steps": 2,
        "save_mode": "async", "max_lost_minutes": 5.0, "mtbf_hours": 5.0, "save_compressed": True,
        "output_dir": "another", "branch": "another", "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 3, "dataloader_pin_memory": True,
        "metric_for_best_model": "eval_other", "greater_is_better": True,
        "load_best_model_at_end": True, "early_stopping_patience": 3,
        "early_stopping_threshold": 0.5, "num_train_epochs": 9.0,
    },
    "equivalent": {
        "micro_batch_size": 4, "lanes": 2, "torch_compile": True, "gradient_checkpointing": True,
        "device": "cpu", "full_determinism": False,
    },
    "changed": {
        "max_steps": 9, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.5,
        "adam_epsilon": 0.5, "sgd_momentum": 0.5, "learning_rate": 0.5,
        "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"power": 2.0}, "warmup_steps": 3,
        "max_grad_norm": 0.5,
        "bf16": True, "fp16": True, "shuffle": False, "data_seed": 5, "samples_per_epoch": 24,
        "dataloader_drop_last": True, "batch_size": 4, "seed": 5,
    },
    "refused": {"optim": "sgd"},
}  # fmt: skip
NEEDS = {
    "lr_scheduler_kwargs": {"lr_scheduler_type": "polynomial"},
    "mtbf_hours": {"save_steps": "auto"},
    "load_best_model_at_end": {"eval_steps": 2},
    "early_stopping_patience": {"eval_steps": 2},
    "batch_size": {"micro_batch_size": 4},
}
EACH_SETTING = [(verdict, *item) for verdict, items in OTHER.items() for item in items.items()]


class Checkpointing(nn.Sequential):
    """A model that can compute its activations again."""

    def gradient_checkpointing_enable(self, **options):
        pass


def of_all_settings(folder, **settings) -> Trainer:
    torch.manual_seed(5)
    model = Checkpointing(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 4))
    settings = {"max_steps": 4, "samples_per_epoch": 36, **settings}
    parts = {"eval_dataset": PAIRS}
    return small_trainer(folder, model=model, trainer=parts, **settings)


@pytest.fixture(scope="module")
def of_default_settings(tmp_path_factory):
    """A folder with a run for each group of settings that others need."""
    folder = tmp_path_factory.mktemp("default")
    for name, needs in {"plain": {}, **NEEDS}.items():
        of_all_settings(folder / name, **needs).train()
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch.compile
@pytest.mark.parametrize(("verdict", "name", "value"), EACH_SETTING, ids=str)
def test_a_change_of_any_one_setting_is_told_with_what_it_means(
    verdict, name, value, of_default_settings, tmp_path
):
    begun = of_default_settings / (name if name in NEEDS else "plain")
    run = shutil.copytree(begun, tmp_path / "run")
    settings = {} if name == "output_dir" else {**NEEDS.get(name, {}), name: value}
    try:
        report = of_all_settings(run, **settings).load_checkpoint(4 if name == "branch" else "must")
        found = report.differences
    except DifferenceError as error:
        found = error.differences
    found = {one.path: one.verdict for one in found if not one.path.startswith("environment.")}
    assert found.pop(name) == verdict
    assert set(found) <= {"output_dir", "schedule"}, "only what was changed is told"


def test_all_settings_are_changed_in_turn():
    of_the_start = {"allow", "skip", "exact_resume", "resume_from_checkpoint"}
    of_the_start |= {"read_from", "ddp_timeout"}
    names = {name for _, name, _ in EACH_SETTING}
    assert names == set(TrainerConfig().to_dict()) - of_the_start


def test_a_schedule_of_another_class_begins_at_the_step_of_the_run(tmp_path):
    parts = {"trainer": {"eval_dataset": PAIRS}, "eval_steps": 1, "max_steps": 8}
    run, anew = tmp_path / "run", tmp_path / "anew"
    plateau = small_trainer(
        run, **{**parts, "max_steps": 4}, lr_scheduler_type="reduce_lr_on_plateau"
    )
    plateau.train()
    small_trainer(run, **parts, allow=["lr_scheduler_type", "scheduler"]).train()
    small_trainer(anew, **parts).train()
    rates = [[line.get("learning_rate") for line in metrics(one)] for one in (run, anew)]
    assert [one for one in rates[0] if one is not None][4:] == [
        one for one in rates[1] if one is not None
    ][4:]
