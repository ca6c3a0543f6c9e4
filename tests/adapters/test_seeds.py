"""The examples that users find on how to resume do what their readers expect."""

from __future__ import annotations

import json

import pytest

from adapters.conftest import Runs


@pytest.fixture(scope="module")
def gpt2(server, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    assert (
        Runs(server, folder, cache)(".", module="adapters.seeds", action="make_pretrained").status
        == 0
    )
    return str(folder)


@pytest.fixture
def script(run, gpt2):
    return lambda name, **more: run(module="adapters.seeds", action=name, gpt2=gpt2, **more)


def test_a_checkpoint_in_the_arguments_is_resumed(script):
    whole = script("basic")
    resumed = script("basic", path="./results/checkpoint-8")
    assert resumed.began == 8
    assert (resumed.step, resumed.digest) == (whole.step, whole.digest)


def test_a_path_may_be_meant_inside_the_output_directory(script):
    script("basic")
    assert script("basic", path="./checkpoint-8").began == 8


def test_a_path_that_is_not_there_is_an_error(script):
    assert "CheckpointNotFoundError" in script("basic", path="./checkpoint-1000").text


def test_a_lower_learning_rate_from_a_file_is_trained_at_and_told(script, run):
    script("basic")
    arguments = {"output_dir": "./results", "per_device_train_batch_size": 4, "use_cpu": True}
    (run.folder / "training_config.json").write_text(json.dumps({**arguments, "report_to": "none"}))
    resumed = script("mismatch", path="./results/checkpoint-8")
    assert (resumed.began, resumed.rate) == (8, 1e-5)
    line = "learning_rate: stored 5e-05, now 1e-05: changed"
    assert any(line in told for told in resumed.report)
    assert line in resumed.text


def test_the_newest_of_many_goes_on_with_accumulation_and_says_nothing(script):
    first = script("basic")
    resumed = script("many")
    assert resumed.began == first.step
    assert "[transformers]" not in resumed.text


def test_latest_is_the_newest_that_is_intact_not_the_highest_number(script, run):
    first = script("basic")
    (run.folder / f"results/checkpoint-{first.step}/model.safetensors").write_bytes(b"torn")
    (run.folder / "results/checkpoint-99999").mkdir()
    resumed = script("basic", path="latest")
    assert resumed.began == 4 * ((first.step - 1) // 4)
    assert (resumed.step, resumed.digest) == (first.step, first.digest)
    assert sum("not used" in line for line in resumed.report) == 2


def test_accumulation_of_another_size_keeps_the_place_in_samples(script):
    script("basic")
    resumed = script("many", word="./results/checkpoint-8")
    assert resumed.began == 8
    assert any("gradient_accumulation_steps: stored 1, now 2" in line for line in resumed.report)
