"""`unbroken train`: a language model of `transformers` on text files, as a YAML file says."""

from __future__ import annotations

import glob
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbroken.config_file import nearest
from unbroken.errors import ConfigError, DataError
from unbroken.language_model.corpus import TokenDataset, builtin_text
from unbroken.language_model.settings import (
    DataSettings,
    TrainSettings,
    parse_settings,
    settings_schema,
)
from unbroken.training import Trainer

_BUILTIN = "builtin"


def train(given: Sequence[str]) -> int:
    """Train, or continue, what the words of the command line ask for; return the exit status.

    `--schema` alone prints the JSON schema of the YAML file instead.

    Raises:
        ConfigError: A setting is wrong.
        DataError: The text is missing or too short.
        TrainingStopped: The training was asked to stop, and saved.
    """
    if list(given) == ["--schema"]:
        sys.stdout.write(json.dumps(settings_schema(), indent=2) + "\n")
        return 0
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


# The causal language models of `transformers`, built from a mapping of settings.


_SIZES = ("_size", "_positions", "_embeddings", "_dim", "_layers", "_heads")


def make_model(
    settings: Mapping[str, Any], *, vocab_size: int, block_size: int, seed: int
) -> nn.Module:
    """Return an untrained model whose weights depend on the settings and the seed alone.

    Args:
        settings: `model_type` ("gpt2" if it is missing), and fields of that model's
            configuration.
        vocab_size: How many tokens the text uses; the model's own, unless it is set.
        block_size: Tokens in one sample.
        seed: Where the weights come from.

    Raises:
        ConfigError: transformers is not installed; the model or a field is unknown, or a value
            is wrong or does not fit the text.
    """
    if importlib.util.find_spec("transformers") is None:
        hint = 'pip install "unbroken[transformers]"'
        raise ConfigError("model", "needs the package transformers, which is not here", hint=hint)
    config = _make_config({"vocab_size": vocab_size, **settings})
    _check_fit(config, vocab_size, block_size)
    return _build(config, seed)


def _make_config(settings: dict[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = settings.pop("model_type", "gpt2")
    _check_model_type(model_type)
    config_class = CONFIG_MAPPING[model_type]
    _check_fields(config_class, settings)
    own_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    try:
        return config_class(**{**own_tokens, **settings})
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigError("model", " ".join(str(error).split())) from error


def _check_model_type(model_type: object) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in known:
        hint = nearest(str(model_type), known)
        raise ConfigError("model.model_type", "no such language model", found=model_type, hint=hint)


def _check_fields(config_class: Any, settings: Mapping[str, Any]) -> None:
    known = {one.name for one in fields(config_class)} | set(config_class.attribute_map)
    for name, value in settings.items():
        if name not in known:
            raise ConfigError("model", f"unknown field {name}", hint=nearest(name, known))
        is_size = name.startswith(("n_", "num_")) or name.endswith(_SIZES)
        if is_size and isinstance(value, int) and value < 1:
            raise ConfigError(f"model.{name}", "must be positive", found=value)


def _check_fit(config: Any, vocab_size: int, block_size: int) -> None:
    if config.vocab_size < vocab_size:
        raise ConfigError(
            "model.vocab_size",
            "is too small for the tokenizer",
            expected=f"at least {vocab_size}",
            found=config.vocab_size,
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and block_size > positions:
        raise ConfigError(
            "data.block_size",
            "is longer than the model's context",
            expected=f"at most {positions}",
            found=block_size,
        )


def _build(config: Any, seed: int) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError("model", " ".join(str(error).split())) from error
    if getattr(model, "loss_type", "") is None:  # what transformers would choose, with a warning
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    return model
