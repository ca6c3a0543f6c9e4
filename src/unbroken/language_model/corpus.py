"""Text as a data set of token windows, and the file of tokens that it is read from.

The file is made once and then mapped into memory. The tokens stand at its beginning,
little-endian, so that `numpy.memmap` reads them; after them stand a JSON object with all facts,
its length in 8 bytes, its xxh3-128 digest in 16, and 8 bytes that name the format.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash

from unbroken.errors import ConfigError, DataError, SaveError
from unbroken.language_model.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    Tokens,
    gpt2_tokenizer,
    learned_bpe,
    tokenizer_from,
)
from unbroken.storage import LocalStorage
from unbroken.stored_names import from_stored, stored_name, to_stored

_log = logging.getLogger("unbroken.language_model")

# A file of tokens.


_FORMAT = b"UNBTOK-1"
_TAIL = 8 + 16 + len(_FORMAT)
_LARGEST_FACTS = 1 << 28
_CHUNK = 1 << 24


@dataclass(frozen=True)
class TokenFile:
    """A token file that is whole.

    Attributes:
        path: Where it stands.
        count: Number of tokens.
        dtype: "<u2" or "<u4".
        digest: xxh3-128 of the tokens' bytes.
        tokenizer: What made the tokens, see `tokenizer_from`.
    """

    path: str
    count: int
    dtype: str
    digest: str
    tokenizer: dict[str, Any]

    def open(self) -> np.memmap[Any, np.dtype[Any]]:
        """Map the tokens into memory, read-only."""
        return np.memmap(self.path, dtype=np.dtype(self.dtype), mode="r", shape=(self.count,))


def write_token_file(
    path: Path, parts: Iterable[Tokens], vocab_size: int, tokenizer: dict[str, Any]
) -> TokenFile:
    """Write a token file; it appears under its name when it is whole and durable, or never.

    Several processes may write the same file at once: each writes its own under a temporary
    name in the same folder, and the first to finish gives it the name.

    Args:
        path: Where it shall stand.
        parts: The tokens.
        vocab_size: Largest token + 1; up to 65,536 a token takes 2 bytes, else 4.
        tokenizer: What made them.

    Raises:
        OSError: It cannot be written.
    """
    storage = LocalStorage(path.parent)
    temporary = f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}"
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    count, digest = 0, xxhash.xxh3_128()
    try:
        with storage.create(temporary) as file:
            for part in parts:
                raw = part.astype(dtype).tobytes()
                file.write(raw)
                digest.update(raw)
                count += part.size
            made = TokenFile(str(path), count, dtype, digest.hexdigest(), tokenizer)
            file.write(_facts(made))
            file.sync()
        _give_name(storage, temporary, path)
    except BaseException:
        if storage.stat(temporary) is not None:
            storage.remove_file(temporary)
        raise
    return made


def read_token_file(path: Path) -> TokenFile | None:
    """Return the token file that stands there, if it is whole to the last byte; else None."""
    try:
        with path.open("rb") as file:
            nbytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, nbytes - _TAIL))
            tail = file.read()
            length = int.from_bytes(tail[:8], "little")
            if tail[24:] != _FORMAT or length > min(_LARGEST_FACTS, nbytes - _TAIL):
                return None
            file.seek(nbytes - _TAIL - length)
            facts = file.read(length)
            if xxhash.xxh3_128_digest(facts) != tail[8:24]:
                return None
            found: TokenFile = from_stored(TokenFile, {**json.loads(facts), "path": str(path)})
            tokens = nbytes - _TAIL - length
            if found.count * np.dtype(found.dtype).itemsize != tokens:
                return None
            file.seek(0)
            return found if _digest_of_tokens(file, tokens) == found.digest else None
    except FileNotFoundError:
        return None


def _give_name(storage: LocalStorage, temporary: str, path: Path) -> None:
    """Put the file in its place, unless another process has put a whole one there."""
    if storage.stat(path.name) is not None and read_token_file(path) is None:
        _log.warning("%s is damaged: it is replaced", path)
        storage.remove_file(path.name)
    try:
        storage.rename(temporary, path.name)
    except FileExistsError:
        storage.remove_file(temporary)
    storage.sync_folder("")


def _facts(made: TokenFile) -> bytes:
    facts = to_stored(made)
    del facts["path"]
    raw = json.dumps(facts).encode()
    return raw + len(raw).to_bytes(8, "little") + xxhash.xxh3_128_digest(raw) + _FORMAT


def _digest_of_tokens(file: Any, nbytes: int) -> str:
    digest = xxhash.xxh3_128()
    while nbytes and (chunk := file.read(min(_CHUNK, nbytes))):
        digest.update(chunk)
        nbytes -= len(chunk)
    return digest.hexdigest()


# From text files to samples.


_PIECE = 1 << 20  # characters read at once

# Before white space that stands alone GPT-2's pattern always ends a word, so that pieces give the
# tokens of the whole text.
_CUT = re.compile(r"(?<=\S)(?=\s\S)")


@stored_name("unbroken.data.text.TokenDataset")
class TokenDataset:
    """Fixed windows over a memory-mapped file of tokens.

    `dataset[i]` is {"input_ids": ids, "labels": the same ids}, two int64 tensors of shape
    (block_size,), as the models of `transformers` take them: the model shifts the labels.
    Tokens after the last whole window are not used. Worker processes map the file themselves;
    nothing is copied to them.

    Args:
        tokens: The token file.
        block_size: Tokens in one sample.
        start: First token used.
        stop: One past the last token used; all by default.

    Raises:
        ConfigError: block_size is not positive.
        DataError: The text is shorter than one block.

    Attributes:
        deterministic: True: a sample depends on its index alone, so that nothing is seeded.
        fingerprint: Changes whenever any sample would.
        block_size: Tokens in one sample.

    Example:
        >>> import tempfile
        >>> text = TokenDataset.from_files(builtin_text(), block_size=8, cache=tempfile.mkdtemp())
        >>> text.tokenizer.decode(text[0]["input_ids"].tolist())
        'HAMLET, '
    """

    deterministic: ClassVar[bool] = True

    def __init__(
        self, tokens: TokenFile, block_size: int, *, start: int = 0, stop: int | None = None
    ) -> None:
        if block_size < 1:
            raise ConfigError("block_size", expected="at least 1", found=block_size)
        self.block_size = block_size
        self._file = tokens
        self._start = start
        self._stop = tokens.count if stop is None else stop
        self._mapped: np.memmap[Any, np.dtype[Any]] | None = None
        if len(self) < 1:
            raise DataError(
                "text",
                "it is shorter than one block",
                expected=f"at least {block_size} tokens",
                found=self._stop - start,
                hint="Give more text, or a smaller block_size.",
            )

    @classmethod
    def from_files(
        cls,
        files: str | PathLike[str] | Sequence[str | PathLike[str]],
        *,
        block_size: int,
        tokenizer: str | Tokenizer = "bytes",
        vocab_size: int | None = None,
        cache: str | PathLike[str] | None = None,
    ) -> TokenDataset:
        """Return the texts as one data set, in the order given, an end-of-text after each.

        The tokens are made once and kept in the cache, under a name that depends on the
        contents of the files and on the tokenizer; a damaged cache is made again.

        Args:
            files: UTF-8 text files.
            block_size: Tokens in one sample.
            tokenizer: "bytes"; "gpt2"; "bpe", learned from these files; or the
                `tokenizer` of another data set.
            vocab_size: Number of tokens that "bpe" learns.
            cache: Folder for the tokens; None: `unbroken` in the user's cache folder, which is
                $XDG_CACHE_HOME or ~/.cache.

        Raises:
            DataError: A file is missing, empty or not UTF-8, or the text is shorter than one
                block.
            ConfigError: The tokenizer is unknown, or what it needs is not installed.
            SaveError: The tokens cannot be written.
        """
        paths = [Path(files)] if isinstance(files, (str, PathLike)) else [Path(f) for f in files]
        if not paths:
            raise DataError("text", "no files are given", expected="at least 1", found=0)
        digests = [digest_of(path) for path in paths]
        requested = _requested(tokenizer, vocab_size)
        folder = _users_cache() if cache is None else Path(cache).absolute()
        path = folder / f"{_key(digests, requested)}.tokens"
        found = read_token_file(path)
        if found is None:
            maker = requested if not isinstance(requested, dict) else _learned(paths, requested)
            parts = _encoded(paths, maker)
            found = _written(path, parts, maker)
        return cls(found, block_size)

    def __len__(self) -> int:
        return (self._stop - self._start) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first = self._start + index % len(self) * self.block_size
        ids = torch.from_numpy(self._tokens()[first : first + self.block_size].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}  # a worker maps the file itself

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return tokenizer_from(self._file.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; changes whenever any sample would."""
        facts = [self._file.digest, self._start, self._stop, self.block_size]
        return xxhash.xxh3_128_hexdigest(json.dumps(facts).encode())

    def split(self, fraction: float) -> tuple[TokenDataset, TokenDataset]:
        """Return the text without its end, and its end: for training and for evaluation.

        Args:
            fraction: The share of the tokens that the second one gets, above 0 and below 1.

        Raises:
            ConfigError: fraction is out of range.
            DataError: One part would be shorter than a block.
        """
        if not 0 < fraction < 1:
            raise ConfigError("fraction", expected="above 0 and below 1", found=fraction)
        cut = self._stop - int((self._stop - self._start) * fraction)
        head = TokenDataset(self._file, self.block_size, start=self._start, stop=cut)
        return head, TokenDataset(self._file, self.block_size, start=cut, stop=self._stop)

    def _tokens(self) -> np.memmap[Any, np.dtype[Any]]:
        if self._mapped is None:
            self._mapped = self._file.open()
        return self._mapped


def builtin_text() -> Path:
    """Return the path of the text that comes with unbroken: Hamlet, 174 kB, public domain."""
    return Path(__file__).parent / "texts" / "hamlet.txt"


def _users_cache() -> Path:
    """Return the folder that the XDG base directory specification gives to programs' caches."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # not set; or relative, and so to be ignored
        folder = os.path.expanduser("~/.cache")
    return Path(folder).absolute() / "unbroken"


def _written(path: Path, parts: Iterable[Tokens], maker: Tokenizer) -> TokenFile:
    try:
        return write_token_file(path, parts, maker.vocab_size, maker.describe())
    except SaveError:
        raise
    except OSError as error:
        hint = "give another folder: --data.cache FOLDER, or cache=... of TokenDataset.from_files"
        what = "the tokens cannot be written"
        raise SaveError(str(path), what, found=error.strerror, hint=hint) from error


def _requested(tokenizer: str | Tokenizer, vocab_size: int | None) -> Tokenizer | dict[str, Any]:
    """The tokenizer, or what is to be learned."""
    if tokenizer == "bpe":
        return {"kind": "bpe", "vocab_size": 1024 if vocab_size is None else vocab_size}
    if vocab_size is not None:
        raise ConfigError("vocab_size", 'has a meaning for tokenizer="bpe" alone')
    if tokenizer == "bytes":
        return ByteTokenizer()
    if tokenizer == "gpt2":
        return gpt2_tokenizer()
    if isinstance(tokenizer, str):
        raise ConfigError("tokenizer", expected='"bytes", "bpe" or "gpt2"', found=repr(tokenizer))
    return tokenizer


def _key(digests: list[str], requested: Tokenizer | dict[str, Any]) -> str:
    what = requested if isinstance(requested, dict) else requested.describe()
    return xxhash.xxh3_128_hexdigest(json.dumps([digests, what], sort_keys=True).encode())


def _learned(paths: Iterable[Path], requested: dict[str, Any]) -> Tokenizer:
    return learned_bpe((text for path in paths for text in pieces(path)), requested["vocab_size"])


def _encoded(paths: Iterable[Path], tokenizer: Tokenizer) -> Iterator[Tokens]:
    end = np.array([tokenizer.eos], dtype=np.uint32)
    for path in paths:
        for text in pieces(path):
            yield tokenizer.encode(text)
        yield end


def digest_of(path: Path) -> str:
    """Return the xxh3-128 digest of a file, in hexadecimal.

    Raises:
        DataError: There is no such file, or it is empty.
    """
    if not path.is_file():
        raise DataError(str(path), "no such text file")
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        nbytes = 0
        while chunk := file.read(_PIECE):
            digest.update(chunk)
            nbytes += len(chunk)
    if nbytes == 0:
        raise DataError(str(path), "the text file is empty")
    return digest.hexdigest()


def pieces(path: Path, size: int = _PIECE) -> Iterator[str]:
    """Return the text of a UTF-8 file in pieces of about `size` characters, each ending at a word.

    Raises:
        DataError: The file is not UTF-8.
    """
    rest = ""
    try:
        with path.open(encoding="utf-8", newline="") as file:  # every character as it stands
            while text := file.read(size):
                rest += text
                cuts = [cut.end() for cut in _CUT.finditer(rest)]
                if cuts:
                    yield rest[: cuts[-1]]
                    rest = rest[cuts[-1] :]
    except UnicodeDecodeError as error:
        raise DataError(str(path), "the text is not UTF-8", found=error.reason) from error
    if rest:
        yield rest
