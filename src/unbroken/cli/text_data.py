"""From the settings of the data to data sets of tokens."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from unbroken.cli.settings import DataSettings
from unbroken.data import TokenDataset, builtin_text
from unbroken.errors import DataError

_BUILTIN = "builtin"


@dataclass(frozen=True)
class Text:
    """The text of a run, as tokens.

    Attributes:
        train: For training.
        evaluation: For evaluation, if any.
    """

    train: TokenDataset
    evaluation: TokenDataset | None

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.train.vocab_size


def open_text(settings: DataSettings) -> Text:
    """Return the text; its tokens are made now, or were made by an earlier start.

    Raises:
        ConfigError: The tokenizer needs a package that is not here.
        DataError: A file is missing, empty or not UTF-8, or a text is shorter than one block.
    """
    train = TokenDataset.from_files(
        _files(settings.train),
        block_size=settings.block_size,
        tokenizer=settings.tokenizer,
        vocab_size=settings.vocab_size if settings.tokenizer == "bpe" else None,
        cache=settings.cache,
    )
    if settings.eval:
        return Text(train, _evaluation(settings, train))
    if settings.eval_fraction > 0:
        return Text(*train.split(settings.eval_fraction))
    return Text(train, None)


def _evaluation(settings: DataSettings, train: TokenDataset) -> TokenDataset:
    """Return the evaluation text, in the tokens of the training text."""
    return TokenDataset.from_files(
        _files(settings.eval),
        block_size=settings.block_size,
        tokenizer=train.tokenizer,
        cache=settings.cache,
    )


def _files(names: Iterable[str]) -> list[Path]:
    """Return the files that paths, globs and "builtin" name, each glob's by name."""
    return [path for name in names for path in _files_of(name)]


def _files_of(name: str) -> list[Path]:
    if name == _BUILTIN:
        return [builtin_text()]
    if not glob.has_magic(name) or Path(name).exists():
        return [Path(name)]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise DataError(name, "no file matches")
    return [Path(path) for path in found if Path(path).is_file()]
