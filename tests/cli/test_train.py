"""train: the same command again is the same run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields

import pytest
from transformers import AutoTokenizer

from unbroken.cli.demo import Child, ChildFailedError, RunObserver, compare_runs
from unbroken.errors import CorruptCheckpointError
from unbroken.language_model import ByteTokenizer
from unbroken.language_model.train import DataSettings
from unbroken.training import TrainerConfig

CONFIG = """\
output_dir: run
max_steps: 6
batch_size: 4
micro_batch_size: 2
save_steps: 2
logging_steps: 1
log_data_digest: true
model: {n_layer: 1, n_head: 2, n_embd: 16, n_positions: 32}
data: {train: "*.txt", eval_fraction: 0.2, block_size: 16}
"""
WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
from unbroken.cli.main import main
sys.exit(main(["train", "config.yaml"]))
"""


@pytest.fixture
def folder(here):
    (here / "a.txt").write_text("To be, or not to be, that is the question.\n" * 20)
    (here / "b.txt").write_text("Whether 'tis nobler in the mind to suffer.\n" * 20)
    (here / "config.yaml").write_text(CONFIG)
    return here


def test_the_same_command_again_goes_on_from_the_end(unbroken, folder):
    status, output, _ = unbroken("train", "config.yaml")
    assert status == 0
    assert "no checkpoint yet: starting at step 0" in output
    assert "step 6/6" in output
    status, output, _ = unbroken("train", "config.yaml")
    assert status == 0
    assert f"resuming from {folder}/run/checkpoint-6" in output
    assert "step 5/6" not in output


def test_a_run_begun_again_at_a_step_ends_with_the_same_bits(unbroken, folder):
    assert unbroken("train", "config.yaml", "--output-dir", "whole")[0] == 0
    assert unbroken("train", "config.yaml")[0] == 0
    assert unbroken("train", "config.yaml", "--resume_from_checkpoint", "2")[0] == 0
    assert len(RunObserver(folder / "run").starts()) == 2
    assert all(one.is_same for one in compare_runs(folder / "whole", folder / "run", step=6))


def test_another_seed_ends_with_other_bits(unbroken, folder):
    assert unbroken("train", "config.yaml")[0] == 0
    assert unbroken("train", "config.yaml", "--output-dir", "other", "--seed", 7)[0] == 0
    parts = compare_runs(folder / "run", folder / "other", step=6)
    assert not any(one.is_same for one in parts[:1])


def test_the_tokens_are_made_once_in_the_users_cache_and_nothing_is_left_in_the_folder(
    unbroken, folder, cache
):
    before = {*os.listdir(folder), "run", "other"}
    unbroken("train", "config.yaml")
    tokens = list((cache / "unbroken").iterdir())
    unbroken("train", "config.yaml", "--output-dir", "other")
    assert list((cache / "unbroken").iterdir()) == tokens
    assert {*os.listdir(folder)} == before


def test_the_tokenizer_is_read_from_the_run_its_checkpoints_and_an_export(unbroken, folder):
    assert unbroken("train", "config.yaml")[0] == 0
    assert unbroken("export", "run", "exported")[0] == 0
    text = "naïve ☃  question"
    for place in ("run", "run/checkpoint-2", "run/checkpoint-6", "exported"):
        found = AutoTokenizer.from_pretrained(folder / place)
        assert found(text)["input_ids"] == ByteTokenizer().encode(text).tolist()


def test_a_changed_byte_of_a_saved_tokenizer_is_damage(unbroken, folder):
    assert unbroken("train", "config.yaml")[0] == 0
    file = folder / "run" / "checkpoint-6" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"end", b"END"))
    status, output, errors = unbroken("verify", "run")
    assert status == CorruptCheckpointError.exit_code
    assert "tokenizer.json" in output + errors


def test_help_lists_every_setting_with_what_it_means(unbroken):
    status, output, _ = unbroken("train", "--help")
    assert status == 0
    names = [field.name for field in fields(TrainerConfig)]
    names += [f"data.{field.name}" for field in fields(DataSettings)]
    assert [name for name in names if f"--{name.replace('_', '-')}" not in output] == []
    assert "The highest learning rate, reached after warm-up." in output
    assert "Tokens in one sample." in output


def test_sigterm_saves_and_ends_with_status_75(folder):
    watch = RunObserver(folder / "run")
    with Child(["config.yaml", "--max-steps", "100000"], folder, folder / "log") as child:
        assert child.wait_until(lambda: watch.step() >= 3)
        os.kill(child.pid, signal.SIGTERM)
        with pytest.raises(ChildFailedError, match="ended with status 75"):
            child.finish()
    assert "stopped by SIGTERM after step" in (folder / "log").read_text()
    assert (folder / "run" / f"checkpoint-{watch.step()}").is_dir()


def test_without_transformers_the_error_names_what_to_install(folder):
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "ConfigError: model: needs the package transformers, which is not here",
        '  pip install "unbroken[transformers]"',
    ]


def test_a_run_that_saves_by_itself_tells_how_often_and_show_tells_it_too(unbroken, folder):
    (folder / "config.yaml").write_text(CONFIG.replace("save_steps: 2", "save_steps: auto"))
    status, output, _ = unbroken("train", "config.yaml", "--mtbf-hours", "3", "--max-steps", "8")
    assert status == 0
    assert re.search(r"saves every .*: a save costs .* s, failures every 3.0 h \(given\)", output)
    assert "failures every 3.0 h (given)" in " ".join(unbroken("show", "run")[1].split())
    cadence = json.loads(unbroken("show", "run", "--json")[1])["run"]["cadence"]
    assert cadence["failures"] == {"count": 0, "seconds": 10800.0, "source": "given"}
