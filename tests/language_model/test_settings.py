"""The settings of train: the command line over the file over the defaults."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from unbroken import errors
from unbroken.cli.main import main
from unbroken.language_model.train import DataSettings, make_model, parse_settings
from unbroken.training import TrainerConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "cli.md"
FILE = """\
output_dir: runs/small
learning_rate: 3e-4
max_steps: 50
model: {n_layer: 2, n_head: 2}
data: {train: [a.txt, b.txt], block_size: 32}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def parse(here):
    (here / "config.yaml").write_text(FILE)
    return lambda *words: parse_settings(["config.yaml", *words])


def test_the_file_is_over_the_defaults(parse):
    settings = parse()
    assert settings.trainer == TrainerConfig(
        output_dir="runs/small", learning_rate=3e-4, max_steps=50
    )
    assert settings.model == {"n_layer": 2, "n_head": 2}
    assert settings.data == DataSettings(train=("a.txt", "b.txt"), block_size=32)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--learning_rate 1e-4", "learning_rate", 1e-4),
        ("--max-steps=100", "max_steps", 100),
        ("--resume_from_checkpoint 1200", "resume_from_checkpoint", 1200),
        ("--resume-from-checkpoint must", "resume_from_checkpoint", "must"),
        ("--resume-from-checkpoint False", "resume_from_checkpoint", False),
        ("--no-shuffle", "shuffle", False),
        ("--bf16", "bf16", True),
        ("--save-steps None", "save_steps", None),
        ("--save-steps auto", "save_steps", "auto"),
        ("--save-steps 7", "save_steps", 7),
        ("--max-lost-minutes 10", "max_lost_minutes", 10.0),
        ("--max-time 01:30:00", "max_time", "01:30:00"),
        ("--max-time 90", "max_time", 90.0),
        ("--lr-scheduler-kwargs min_lr_rate 0.1", "lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
    ],
)
def test_the_command_line_is_over_the_file(parse, words, field, value):
    found = getattr(parse(*words.split()).trainer, field)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--model.n-layer 3", "n_layer", 3),
        ("--model.n_layer=3", "n_layer", 3),
        ("--model.model-type llama", "model_type", "llama"),
        ("--model.initializer-range 2e-2", "initializer_range", 0.02),
        ("--model.tie-word-embeddings False", "tie_word_embeddings", False),
        ("--model.n-inner None", "n_inner", None),
    ],
)
def test_model_settings_are_read_as_what_they_look_like(parse, words, field, value):
    found = parse(*words.split()).model
    assert found == {"n_layer": 2, "n_head": 2, field: value}
    assert type(found[field]) is type(value)


def test_data_settings_are_overridden_one_by_one(parse):
    data = parse("--data.train", "c.txt", "d.txt", "--data.tokenizer", "bpe").data
    assert data == DataSettings(train=("c.txt", "d.txt"), block_size=32, tokenizer="bpe")


SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16}


def weights(seed):
    model = make_model(SMALL, vocab_size=32, block_size=16, seed=seed)
    return [bytes(p.detach().reshape(-1).view(torch.uint8)) for p in model.parameters()]


def test_the_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one = weights(seed=5)
    torch.manual_seed(2)
    assert weights(seed=5) == one != weights(seed=6)


def test_making_a_model_draws_no_ambient_random_number():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    weights(seed=5)
    assert bytes(torch.get_rng_state()) == bytes(before)


def test_any_causal_language_model_can_be_named():
    settings = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8}
    settings |= {"num_attention_heads": 2, "intermediate_size": 16}
    model = make_model(settings, vocab_size=32, block_size=16, seed=5)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_the_file_in_the_documents_is_accepted(here):
    text = (DOCUMENT.read_text().partition("```yaml\n")[2]).partition("```")[0]
    (here / "config.yaml").write_text(text)
    settings = parse_settings(["config.yaml"])
    model = make_model(settings.model, vocab_size=2048, block_size=256, seed=1)
    assert model.config.n_embd == 384


def test_the_documents_give_each_error_its_status():
    text = DOCUMENT.read_text()
    classes = [getattr(errors, name) for name in dir(errors) if name.endswith("Error")]
    missing = [
        one.__name__
        for one in classes
        if one is not errors.UnbrokenError
        and not re.search(rf"^\| {one.exit_code} \|.*`{one.__name__}`", text, re.MULTILINE)
    ]
    assert missing == []


def test_the_schema_has_each_setting_with_its_default_and_its_text(capsys):
    assert main(["train", "--schema"]) == 0
    settings = json.loads(capsys.readouterr().out)["properties"]
    assert settings.keys() == {*TrainerConfig().to_dict(), "data", "model"}
    assert settings["warmup_steps"]["minimum"] == 0
    assert settings["batch_size"]["default"] == 8
    assert "rises from 0" in settings["warmup_steps"]["description"]
    assert settings["data"]["properties"].keys() == {one.name for one in fields(DataSettings)}


def test_without_pydantic_the_schema_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert main(["train", "--schema"]) == 2
    assert 'needs pydantic\n  pip install "unbroken[transformers]"' in capsys.readouterr().err
