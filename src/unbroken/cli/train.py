"""`unbroken train`: a language model on text files, as a YAML file says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from unbroken.cli.language_model import make_model
from unbroken.cli.settings import TrainSettings, parse_settings
from unbroken.cli.text_data import open_text
from unbroken.errors import ConfigError
from unbroken.training import Trainer


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
        settings={"model": settings.model, "data": asdict(settings.data)},
    ).train()
    return 0


def _check_evaluation(settings: TrainSettings) -> None:
    if settings.trainer.evaluates and not settings.data.has_evaluation:
        raise ConfigError("eval_steps", "needs text: data.eval or data.eval_fraction")
