"""What is wrong in a command line or a file is said in one sentence: one row each."""

from __future__ import annotations

import pytest
import yaml

from cli.sample_run import in_a_process

GOOD = {
    "output_dir": "run",
    "max_steps": 2,
    "batch_size": 4,
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32},
    "data": {"train": "text.txt", "block_size": 16},
}


def config(**changes):
    """Return the good configuration with some values changed: model__n_head=3 or batch_size=5."""
    values = {name: dict(v) if isinstance(v, dict) else v for name, v in GOOD.items()}
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (values[part] if part else values)[key] = value
    return values


@pytest.fixture
def folder(here):
    """A folder with a text, an empty text and a folder of somebody else."""
    (here / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    (here / "empty.txt").touch()
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter.tex").touch()
    return here


# what is changed in the file, more words, exit status, words of the message
IN_THE_FILE = [
    ({"learning_rte": 1e-3}, 2, "unknown field learning_rte", "did you mean learning_rate?"),
    ({"data__blocksize": 8}, 2, "data: unknown field blocksize", "did you mean block_size?"),
    ({"model__n_lyer": 2}, 2, "model: unknown field n_lyer", "did you mean n_layer?"),
    ({"batch_size": -4}, 2, "batch_size: must be positive: found -4"),
    ({"batch_size": "four"}, 2, "batch_size: expected int, found 'four'"),
    ({"batch_size": True}, 2, "batch_size: expected int, found True"),
    ({"micro_batch_size": 3}, 2, "batch_size", "expected a multiple of 3, found 4"),
    ({"learning_rate": "fast"}, 2, "learning_rate: expected float, found 'fast'"),
    ({"learning_rate": float("nan")}, 2, "learning_rate: must not be negative: found nan"),
    ({"max_steps": 0}, 2, "max_steps", "found 0"),
    ({"eval_steps": 1}, 2, "eval_steps: needs text: data.eval or data.eval_fraction"),
    ({"device": "tpu9"}, 2, "device", "found tpu9"),
    ({"data": ["text.txt"]}, 2, "data: expected fields with values, found list"),
    ({"model": "gpt2"}, 2, "model: expected fields with values, found str"),
    ({"data__block_size": 0}, 2, "data.block_size: must be positive: found 0"),
    ({"data__block_size": 64}, 2, "data.block_size: is longer than the model's context"),
    ({"data__block_size": "16"}, 2, "data.block_size: expected int, found '16'"),
    ({"data__eval_fraction": 1.0}, 2, "data.eval_fraction", "found 1.0"),
    ({"data__tokenizer": "words"}, 2, "data.tokenizer: expected", "found 'words'"),
    ({"data__train": []}, 2, "data.train: expected at least one file, found none"),
    ({"data__train": "missing.txt"}, 3, "missing.txt"),
    ({"data__train": "nothing-*.txt"}, 3, "nothing-*.txt"),
    ({"data__train": "empty.txt"}, 3, "DataError", "empty.txt"),
    ({"model__model_type": "gpt3"}, 2, "model.model_type: no such language model: found gpt3"),
    ({"model__n_layer": 0}, 2, "model.n_layer: must be positive: found 0"),
    ({"model__n_layer": "two"}, 2, "'n_layer' expected int, got str"),
    ({"model__n_head": 3}, 2, "divisible"),
    ({"model__vocab_size": 8}, 2, "model.vocab_size: is too small for the tokenizer"),
    ({"output_dir": "thesis"}, 5, "thesis", "holds something else", "chapter.tex"),
    ({"output_dir": "text.txt"}, 5, "text.txt"),
    ({"resume_from_checkpoint": "must"}, 9, "no checkpoint to resume"),
    ({"resume_from_checkpoint": 100}, 9, "no such checkpoint", "found 100"),
]


@pytest.mark.parametrize(
    ("changes", "status", *["words"]), [(r[0], r[1], r[2:]) for r in IN_THE_FILE]
)
def test_a_wrong_file_is_told_in_one_sentence(unbroken, folder, changes, status, words):
    (folder / "config.yaml").write_text(yaml.safe_dump(config(**changes)))
    found, _, errors = unbroken("train", "config.yaml")
    assert (found, "Traceback" in errors) == (status, False), errors
    assert [word for word in words if word not in errors] == [], errors


ON_THE_COMMAND_LINE = [
    ("train", 2, "--help"),
    ("train missing.yaml", 2, "missing.yaml: no such file"),
    ("train text.txt", 2, "text.txt"),
    ("train empty.yaml --data.train missing.txt", 3, "missing.txt"),
    ("train good.yaml --learning_rte 1", 2, "unknown option --learning_rte", "--learning_rate?"),
    ("train good.yaml --data.blocksize 1", 2, "unknown option", "--data.block_size?"),
    ("train good.yaml --batch-size four", 2, "four"),
    ("train good.yaml --batch-size -4", 2, "batch_size: must be positive: found -4"),
    ("train good.yaml --micro_batch_size 3", 2, "expected a multiple of 3, found 4"),
    ("train good.yaml --model.n-lyer 3", 2, "unknown field n_lyer", "did you mean n_layer?"),
    ("train good.yaml --model.n-layer", 2, "--model.n-layer: expected a value"),
    ("train good.yaml --model.n-head 3", 2, "divisible"),
    ("train good.yaml more", 2, "unexpected word more"),
    ("lst", 2, "lst"),
    ("ls nothing", 5, "nothing: no such directory"),
    ("ls", 5, "no run in ./runs or here"),
    ("show thesis", 5, "thesis: is neither a run directory nor a checkpoint"),
    ("verify thesis", 5, "thesis: is neither a run directory nor a checkpoint"),
    ("verify text.txt", 5, "text.txt: is neither a run directory nor a checkpoint"),
    ("demo --steps 3", 2, "--steps: expected at least 12, found 3"),
    ("demo --kills 0", 2, "--kills: expected at least 1, found 0"),
    ("demo --keep thesis", 2, "--keep: expected a new or empty folder, found thesis"),
]


@pytest.mark.parametrize(
    ("command", "status", "words"), [(r[0], r[1], r[2:]) for r in ON_THE_COMMAND_LINE]
)
def test_a_wrong_command_line_is_told_in_one_sentence(unbroken, folder, command, status, words):
    (folder / "good.yaml").write_text(yaml.safe_dump(GOOD))
    (folder / "empty.yaml").touch()
    found, output, errors = unbroken(*command.split())
    assert (found, "Traceback" in errors) == (status, False), errors
    assert [word for word in words if word not in output + errors] == [], output + errors


@pytest.mark.parametrize(
    ("command", "status", "sentence"),
    [
        ("verify gpt2", 10, ""),
        (
            "show gpt2/checkpoint-20",
            10,
            "CorruptCheckpointError: checkpoint-20: state.json: is missing",
        ),
        ("show gpt2/checkpoint-30", 9, "expected one of the steps [0, 10, 20], found 30"),
        ("verify gpt2 --step 30", 9, "expected one of the steps [0, 10, 20], found 30"),
    ],
)
def test_a_damaged_or_missing_checkpoint_is_told(unbroken, run, command, status, sentence):
    (run / "checkpoint-20" / "state.json").unlink()
    found, _, errors = unbroken(*command.split())
    assert found == status
    assert sentence in errors


def test_a_real_process_ends_with_the_status_and_the_hint_and_no_traceback(folder):
    (folder / "config.yaml").write_text("learning_rte: 1\n")
    ended = in_a_process("train", "config.yaml", cwd=folder)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == [
        "ConfigError: config.yaml: unknown field learning_rte",
        "  did you mean learning_rate?",
    ]
