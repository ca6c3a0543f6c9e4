"""A file of tokens, made once and then mapped into memory.

The tokens stand at the beginning, little-endian, so that `numpy.memmap` reads them; after them
stand a JSON object with all facts, its length in 8 bytes, its xxh3-128 digest in 16, and 8 bytes
that name the format.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from unbroken.language_model.tokenizer import Tokens
from unbroken.storage import LocalStorage
from unbroken.stored_names import from_stored, to_stored

_FORMAT = b"UNBTOK-1"
_TAIL = 8 + 16 + len(_FORMAT)
_LARGEST_FACTS = 1 << 28
_CHUNK = 1 << 24

_log = logging.getLogger("unbroken.language_model")


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
            return found if _digest_of(file, tokens) == found.digest else None
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


def _digest_of(file: Any, nbytes: int) -> str:
    digest = xxhash.xxh3_128()
    while nbytes and (chunk := file.read(min(_CHUNK, nbytes))):
        digest.update(chunk)
        nbytes -= len(chunk)
    return digest.hexdigest()
