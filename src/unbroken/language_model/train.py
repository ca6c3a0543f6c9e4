"""`unbroken train`: a language model on text files, as a YAML file says."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from unbroken.errors import ConfigError, DataError
from unbroken.language_model.corpus import TokenDataset, builtin_text
from unbroken.language_model.model import make_model
from unbroken.language_model.settings import DataSettings, TrainSettings, parse_settings
from unbroken.training import Trainer

_BUILTIN = "builtin"


def train(given: Sequence[str]) -> int:
    """Train, or continue, what the words of the command line ask for; return the exit status.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The text is missing or too short.
        TrainingStopped: The training was asked to stop, and saved.
    """
    settings = parse_settings(given)
    _check_evaluation(settings)
    text = open_text(settings.data)
    make = partial(
        make_model,
        settings.model,
        vocab_size=text.vocab_size,
        block_size=settings.data.block_size,
        seed=settings.trainer.seed,
    )
    Trainer(
        make,
        settings.trainer,
        text.train,
        eval_dataset=text.evaluation,
        processing_class=text.train.tokenizer,
        settings={"model": settings.model, "data": asdict(settings.data)},
    ).train()
    return 0


def _check_evaluation(settings: TrainSettings) -> None:
    if settings.trainer.evaluates and not settings.data.has_evaluation:
        raise ConfigError("eval_steps", "needs text: data.eval or data.eval_fraction")


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
