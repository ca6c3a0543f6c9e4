"""TrainerConfig refuses what cannot be meant, by name and with the value."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from unbroken.changes.rules import LENGTH_SETTINGS, RUN_LENGTH
from unbroken.errors import ConfigError
from unbroken.training import NoDisplay, Trainer, TrainerConfig
from unbroken.training.config import settings

BAD_VALUES = {
    "batch_size": (0, -8, 1.5, "8", True),
    "micro_batch_size": (0, -1),
    "max_steps": (0, -2, 1.5),
    "num_train_epochs": (0.0, -1.0),
    "learning_rate": (-1e-3, float("nan"), "fast"),
    "adam_beta1": (1.0, -0.1),
    "weight_decay": (-0.1,),
    "save_steps": (0, -1, "often", True),
    "max_lost_minutes": (0, -1.0, "auto"),
    "mtbf_hours": (0.0, 3.0),  # the second without save_steps="auto"
    "save_total_limit": (0,),
    "lr_scheduler_type": ("cosinus",),
    "optim": ("adam_w",),
    "max_time": ("ten minutes", "1:2", -5.0),
    "seed": (-1, 1.5),
    "dataloader_num_workers": (-1,),
    "early_stopping_patience": (3,),  # without evaluation
    "load_best_model_at_end": (True,),  # without evaluation
    "output_dir": ("", 3),
    "allow": (("learning_rte",), "seed"),
}
CASES = [(name, value) for name, values in BAD_VALUES.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_bad_value_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(ConfigError, match=name):
        TrainerConfig(**{name: value})


def test_a_batch_that_micro_batches_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size: .* expected a multiple of 3, found 8"):
        TrainerConfig(batch_size=8, micro_batch_size=3)


def test_both_half_precisions_at_once_are_refused():
    with pytest.raises(ConfigError, match="fp16"):
        TrainerConfig(fp16=True, bf16=True)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("learning_rte", "learning_rate"), ("max_step", "max_steps"), ("bachsize", "batch_size")],
)
def test_an_unknown_field_is_answered_with_the_nearest_one(wrong, right):
    with pytest.raises(ConfigError, match=wrong) as raised:
        TrainerConfig.from_dict({wrong: 1})
    assert raised.value.hint == f"did you mean {right}?"


def test_a_configuration_cannot_be_changed_by_accident():
    with pytest.raises(FrozenInstanceError):
        TrainerConfig().seed = 1


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_a_configuration_survives_its_file(suffix, tmp_path):
    config = TrainerConfig(learning_rate=3e-4, max_time="01:00:00", micro_batch_size=4)
    config.to_file(tmp_path / f"config{suffix}")
    assert TrainerConfig.from_file(tmp_path / f"config{suffix}") == config


def test_yaml_reads_3e_minus_4_as_a_number(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 3e-4\n")
    assert TrainerConfig.from_file(tmp_path / "config.yaml").learning_rate == 3e-4


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "- 1\n- 2\n"), ("b.json", "{"), ("c.yaml", "a: [1"), ("d.toml", "a = 1")],
)
def test_a_file_that_is_no_configuration_is_refused_by_its_path(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=name[0]):
        TrainerConfig.from_file(tmp_path / name)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        TrainerConfig.from_file("nowhere.yaml")


# Ours alone, for a reason: the global batch, minutes beside steps, this library's own work.
OWN = {
    "read_from",
    "allow", "skip", "exact_resume", "branch", "batch_size", "micro_batch_size", "shuffle",
    "samples_per_epoch", "sgd_momentum", "device", "lanes",
    "logging_minutes", "log_data_digest", "eval_minutes", "eval_batch_size", "save_minutes",
    "max_lost_minutes", "mtbf_hours", "save_at_start", "save_compressed", "save_mode",
    "verify_steps", "keep_every_n_steps", "max_time", "confirm_stops",
    "early_stopping_patience", "early_stopping_threshold",
}  # fmt: skip


def test_every_other_name_is_one_of_transformers():
    theirs = {field.name for field in fields(TrainingArguments)}
    ours = {field.name for field in fields(TrainerConfig)}
    assert ours - theirs == OWN


def test_each_field_says_what_another_value_means_for_a_resume():
    assert [one.name for one in fields(TrainerConfig) if "setting" not in one.metadata] == []


def test_what_says_how_long_a_run_is_has_the_rule_of_lengths():
    rules = {name: one.rule for name, one in settings().items()}
    assert tuple(name for name, rule in rules.items() if rule == RUN_LENGTH) == LENGTH_SETTINGS


def test_all_fields_are_plain_json():
    assert json.loads(json.dumps(TrainerConfig().to_dict())) == TrainerConfig().to_dict()


def test_a_model_with_complex_parameters_trains_with_the_default_optimizer(tmp_path):
    model = torch.nn.Linear(2, 1, dtype=torch.complex64)
    config = TrainerConfig(output_dir=str(tmp_path), max_steps=1, batch_size=1)
    data = [(torch.ones(2, dtype=torch.complex64), torch.ones(1))]
    loss = lambda outputs, labels: (outputs.abs() - labels).square().mean()  # noqa: E731
    assert (
        Trainer(model, config, data, loss_fn=loss, display=NoDisplay()).train().progress.step == 1
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("optim", "adam_w", "one of: adamw_torch, adamw_torch_fused, sgd, adafactor"),
        ("lr_scheduler_type", "cosinus", "one of: linear, cosine, "),
        ("exact_resume", True, "one of: prefer, require"),
        ("save_steps", "often", "int, auto or none"),
        ("allow", "seed", "a list of texts"),
        ("batch_size", "8", "int"),
        ("bf16", 1, "bool"),
        ("lr_scheduler_kwargs", 3, "names with numbers or none"),
        ("skip", {"head"}, "a list of texts"),
        ("skip", ("head", 1), "a list of texts"),
    ],
)
def test_what_a_setting_takes_is_said_in_words_and_choices(name, value, expected):
    with pytest.raises(ConfigError) as caught:
        TrainerConfig(**{name: value})
    assert str(caught.value).startswith(f"{name}: expected {expected}")
    assert "Literal" not in str(caught.value)


def test_a_wrong_value_inside_a_setting_is_named_by_its_path():
    with pytest.raises(ConfigError) as caught:
        TrainerConfig(lr_scheduler_kwargs={"power": 2, "num_cycles": "two"})
    assert str(caught.value) == "lr_scheduler_kwargs.num_cycles: expected float, found 'two'"


def test_a_number_of_numpy_is_a_number():
    assert TrainerConfig(learning_rate=np.float64(0.5)).learning_rate == 0.5


def test_the_nearest_choice_is_named():
    with pytest.raises(ConfigError) as caught:
        TrainerConfig(lr_scheduler_type="cosinus")
    assert caught.value.hint == "did you mean cosine?"


def test_a_keyword_that_is_no_setting_is_answered_with_the_nearest_one():
    with pytest.raises(ConfigError, match="TrainerConfig: unknown field learning_rat") as caught:
        TrainerConfig(learning_rat=1e-3)
    assert caught.value.hint == "did you mean learning_rate?"
