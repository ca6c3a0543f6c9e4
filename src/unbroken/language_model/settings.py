"""From a YAML file and the words of a command line to the settings of `unbroken train`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import tyro
from tyro.conf import Positional, arg

from unbroken.config_file import nearest, read_mapping
from unbroken.config_schema import DESCRIBED, PositiveInt, Share, check_fields, schema_of
from unbroken.errors import ConfigError
from unbroken.training import TrainerConfig


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which text is trained on, and how it becomes tokens.

    Raises:
        ConfigError: A value has the wrong type or is out of range.

    Example:
        >>> DataSettings(train="book.txt").train
        ('book.txt',)
    """

    __pydantic_config__: ClassVar = DESCRIBED

    train: tuple[str, ...] = ("builtin",)
    """Text files, also as globs; "builtin": the text that comes with unbroken."""
    eval: tuple[str, ...] = ()
    """Text files for evaluation; none: `eval_fraction` decides."""
    eval_fraction: Share = 0.0
    """This share of the training text, from its end, is for evaluation instead."""
    tokenizer: Literal["bytes", "bpe", "gpt2"] = "bytes"
    """"bytes": 256 tokens; "bpe": byte pairs learned from the training text; "gpt2"."""
    vocab_size: PositiveInt = 1024
    """How many tokens `tokenizer="bpe"` learns."""
    block_size: PositiveInt = 128
    """Tokens in one sample."""
    cache: str | None = None
    """Folder for the tokens, which are made once; None: `unbroken` in the user's cache folder."""

    def __post_init__(self) -> None:
        for name in ("train", "eval"):
            value = getattr(self, name)
            texts = (value,) if isinstance(value, str) else value
            object.__setattr__(self, name, tuple(texts) if isinstance(texts, list) else texts)
        check_fields(self, "data.")
        if not self.train:
            raise ConfigError("data.train", expected="at least one file", found="none")
        if self.eval and self.eval_fraction:
            raise ConfigError("data.eval_fraction", "cannot be combined with data.eval: choose one")

    @property
    def has_evaluation(self) -> bool:
        """Whether any text is for evaluation."""
        return bool(self.eval) or self.eval_fraction > 0


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that `unbroken train` was asked for.

    Attributes:
        trainer: The settings of the Trainer.
        data: Which text.
        model: `model_type`, and fields of that model's configuration.
    """

    trainer: TrainerConfig
    data: DataSettings
    model: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Words(TrainerConfig):
    """The settings as they stand on the command line: they are checked when all are together."""

    resume_from_checkpoint: Annotated[bool | int | str, arg(aliases=("--resume",))] = "auto"
    config: Positional[str]
    """YAML file with any of these settings; `model:` and `data:` are mappings in it."""
    data: DataSettings = field(default_factory=DataSettings)

    def __post_init__(self) -> None:
        """Check nothing yet."""


_DESCRIPTION = """Train a causal language model on text files, as a YAML file says.

The same command continues a run that was stopped or killed. Each setting of the file can be
given here too, and wins: --learning-rate 1e-4, --data.block-size 64. The model is set by
--model.FIELD VALUE with any field of its `transformers` configuration: --model.n-layer 2.
`unbroken train --schema` prints the JSON schema of the file, for editors."""


def parse_settings(given: Sequence[str]) -> TrainSettings:
    """Return the settings: those of the file, under those of the command line.

    Raises:
        ConfigError: A setting is unknown, has the wrong type, or does not fit the others.
        SystemExit: With status 0 after `--help`, with 2 if a value cannot be read.
    """
    given, model = _take_model_options(given)
    path = Path(_parse(given, None).config)
    in_file = read_mapping(path)
    data = _data_of(in_file.pop("data", {}), f"{path}: data")
    model_in_file = _mapping(in_file.pop("model", {}), f"{path}: model")
    trainer = TrainerConfig.from_dict(in_file, where=str(path))
    words = _parse(given, _Words(config=str(path), data=data, **_fields_of(trainer)))
    return TrainSettings(
        trainer=TrainerConfig(**_fields_of(words)),
        data=words.data,
        model={**model_in_file, **model},
    )


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of the YAML file, for editors that complete and check it.

    Example:
        >>> sorted(settings_schema()["properties"]["data"]["properties"]["tokenizer"]["enum"])
        ['bpe', 'bytes', 'gpt2']
    """
    schema, data = schema_of(TrainerConfig), schema_of(DataSettings)
    for name in ("train", "eval"):  # one text stands for a list of one
        several = data["properties"][name]
        one = {"type": "string"}
        kinds = [{key: several.pop(key) for key in ("type", "items")}, one]
        data["properties"][name] = {"anyOf": kinds, **several}
    model = {
        "type": "object",
        "properties": {"model_type": {"type": "string", "default": "gpt2"}},
        "description": "`model_type`, and fields of that model's configuration in transformers.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "unbroken train",
        **schema,
        "properties": {**schema["properties"], "data": data, "model": model},
    }


def _fields_of(config: TrainerConfig) -> dict[str, Any]:
    """Return the fields of TrainerConfig as they are, not made plain for a file."""
    return {one.name: getattr(config, one.name) for one in fields(TrainerConfig)}


def _parse(given: Sequence[str], default: _Words | None) -> _Words:
    words, unknown = tyro.cli(
        _Words,
        prog="unbroken train",
        description=_DESCRIPTION,
        args=list(given),
        default=default,
        return_unknown_args=True,
    )
    if unknown:
        raise _unknown_option(unknown[0])
    return cast("_Words", words)


def _unknown_option(word: str) -> ConfigError:
    names = [one.name for one in fields(TrainerConfig)]
    names += [f"data.{one.name}" for one in fields(DataSettings)]
    asked = word.partition("=")[0].lstrip("-").replace("-", "_")
    hint = nearest(f"--{asked}", [f"--{name}" for name in names])
    what = "unknown option" if word.startswith("-") else "unexpected word"
    return ConfigError("unbroken train", f"{what} {word}", hint=hint)


def _take_model_options(given: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Split `--model.FIELD VALUE` off: which fields there are depends on the model."""
    rest: list[str] = []
    model: dict[str, Any] = {}
    words = iter(given)
    for word in words:
        if not word.startswith("--model."):
            rest.append(word)
            continue
        name, is_joined, value = word.removeprefix("--model.").partition("=")
        text = value if is_joined else next(words, None)
        if text is None or text.startswith("--"):
            raise ConfigError(word, expected="a value", found="nothing")
        model[name.replace("-", "_")] = _value_of(text)
    return rest, model


def _value_of(text: str) -> Any:
    """Return a number, a truth value, None or a list where the text is one; else the text."""
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _data_of(given: Any, where: str) -> DataSettings:
    values = _mapping(given, where)
    known = [one.name for one in fields(DataSettings)]
    for name in values:
        if name not in known:
            raise ConfigError(where, f"unknown field {name}", hint=nearest(name, known))
    return DataSettings(**values)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(where, expected="fields with values", found=type(value).__name__)
    return value
