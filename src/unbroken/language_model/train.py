"""`unbroken train`: a language model of `transformers` on text files, as a YAML file says."""

from __future__ import annotations

import glob
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import tyro
from torch import nn
from tyro.conf import Positional, arg

from unbroken.config_file import nearest, read_mapping
from unbroken.config_schema import DESCRIBED, PositiveInt, Share, check_fields, schema_of
from unbroken.errors import ConfigError, DataError
from unbroken.language_model.corpus import TokenDataset, builtin_text
from unbroken.training import Trainer, TrainerConfig

_BUILTIN = "builtin"

# From a YAML file and the words of a command line to settings.


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


# The command, and the text that it trains on.


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
    _check_model_fields(config_class, settings)
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


def _check_model_fields(config_class: Any, settings: Mapping[str, Any]) -> None:
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
