"""Text files, read in pieces that no tokenizer minds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import xxhash

from unbroken.errors import DataError

_PIECE = 1 << 20  # characters read at once

# Before white space that stands alone GPT-2's pattern always ends a word, so that pieces give the
# tokens of the whole text.
_CUT = re.compile(r"(?<=\S)(?=\s\S)")


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
