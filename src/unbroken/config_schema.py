"""Settings checked against the types of their fields, and the JSON schema of a file of them.

typeguard checks types, as tyro does; limits stand at the fields as annotated-types; pydantic reads
both for the schema, and is imported for nothing else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typeguard
from annotated_types import Ge, Gt, Lt

from unbroken.config_file import nearest
from unbroken.errors import ConfigError, one_of

PositiveInt = Annotated[int, Gt(0)]
NotNegativeInt = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]

_ALL = typeguard.CollectionCheckStrategy.ALL_ITEMS

DESCRIBED = {"extra": "forbid", "use_attribute_docstrings": True}
"""`__pydantic_config__` of settings: the text below a field describes it in the schema."""


def check_fields(settings: Any, prefix: str = "") -> None:
    """Check each field of a dataclass against its type and its limits.

    Args:
        settings: An instance of a dataclass.
        prefix: What stands before the name of a field in a message: "data.".

    Raises:
        ConfigError: A field has the wrong type or is out of range; the message names it, and the
            value within it that is wrong.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Training:
        ...     steps: PositiveInt = 1
        ...     schedule: Literal["linear", "cosine"] = "linear"
        >>> check_fields(Training(steps=0))
        Traceback (most recent call last):
            ...
        unbroken.errors.ConfigError: steps: must be positive: found 0
    """
    kind: Any = type(settings)
    for name, (hint, limits) in _checks(kind).items():
        value = getattr(settings, name)
        if not _is_of(value, hint):
            raise _wrong_type(prefix + name, hint, value)
        if not _is_within(value, limits):
            raise _out_of_range(prefix + name, limits, value)


@cache
def _checks(kind: Any) -> dict[str, tuple[Any, tuple[object, ...]]]:
    """Return for each field its type without limits, and its limits."""
    plain, limited = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    names = [one.name for one in fields(kind)]
    return {name: (plain[name], tuple(_limits(limited[name]))) for name in names}


def _limits(hint: Any) -> Iterator[object]:
    if get_origin(hint) is Annotated:
        yield from (one for one in hint.__metadata__ if isinstance(one, Gt | Ge | Lt))
    for part in get_args(hint):
        yield from _limits(part)


def _is_of(value: object, hint: Any) -> bool:
    """Return whether a value is of a type; an int is a float, no bool is either."""
    if isinstance(value, bool):
        return bool in (hint, *get_args(hint))
    try:
        typeguard.check_type(value, hint, collection_check_strategy=_ALL)  # else the first alone
    except typeguard.TypeCheckError:
        return False
    return True


def _is_within(value: Any, limits: tuple[Any, ...]) -> bool:
    if not limits or not isinstance(value, int | float):
        return True
    return value < math.inf and all(_KEEPS[type(limit)](value, limit) for limit in limits)


_KEEPS: dict[type, Callable[[float, Any], bool]] = {
    Gt: lambda value, limit: bool(value > limit.gt),
    Ge: lambda value, limit: bool(value >= limit.ge),
    Lt: lambda value, limit: bool(value < limit.lt),
}


def _wrong_type(where: str, hint: Any, value: object) -> ConfigError:
    if isinstance(value, dict) and (items := _of_items(hint)) is not None:
        for key, item in value.items():
            if isinstance(key, str) and not _is_of(item, items):
                where, hint, value = f"{where}.{key}", items, item
                break
    near = nearest(value, choices_in(hint)) if isinstance(value, str) else None
    return ConfigError(where, expected=in_words(hint), found=repr(value), hint=near)


def _of_items(hint: Any) -> Any:
    """Return the type of the values of a mapping; None: it is none."""
    kinds = (hint, *get_args(hint))
    return next((get_args(one)[1] for one in kinds if get_origin(one) is dict), None)


def _out_of_range(where: str, limits: tuple[object, ...], value: object) -> ConfigError:
    if any(isinstance(limit, Lt) for limit in limits):
        return ConfigError(where, expected="a number in [0, 1)", found=value)
    is_positive = any(isinstance(limit, Gt) for limit in limits)
    what = "must be positive" if is_positive else "must not be negative"
    return ConfigError(where, what, found=value)


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a file that sets fields of a dataclass.

    Each field has its default, and the text below it in the source as its description.

    Raises:
        ConfigError: pydantic is not installed.

    Example:
        >>> from unbroken.training import TrainerConfig
        >>> schema_of(TrainerConfig)["properties"]["optim"]["enum"]
        ['adamw_torch', 'adamw_torch_fused', 'sgd', 'adafactor']
    """
    try:
        from pydantic import TypeAdapter
        from pydantic.json_schema import PydanticJsonSchemaWarning
    except ImportError:
        hint = 'pip install "unbroken[transformers]"'
        raise ConfigError("the schema of settings", "needs pydantic", hint=hint) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PydanticJsonSchemaWarning)  # of a default of our own class
        schema = TypeAdapter(kind).json_schema()
    properties = {name: dict(part) for name, part in schema["properties"].items()}
    for one in fields(kind):
        properties[one.name].pop("title", None)
        if isinstance(one.default, int) and "default" not in properties[one.name]:
            properties[one.name]["default"] = int(one.default)
    return {"type": "object", "properties": properties, "additionalProperties": False}


def choices_in(hint: Any) -> list[str]:
    """Return the texts that a type admits by name.

    Example:
        >>> choices_in(int | Literal["auto"] | None)
        ['auto']
    """
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [text for part in get_args(hint) for text in choices_in(part)]


def in_words(hint: Any) -> str:
    """Return the type of a setting as text, with its choices.

    Example:
        >>> in_words(Literal["linear", "cosine"])
        'one of: linear, cosine'
        >>> in_words(int | Literal["auto"] | None), in_words(tuple[str, ...])
        ('int, auto or none', 'a list of texts')
    """
    if get_origin(hint) is Literal:
        return one_of(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        words = [_word(part) for part in get_args(hint)]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    return _word(hint)


def _word(hint: Any) -> str:
    texts, origin = choices_in(hint), get_origin(hint)
    if texts:
        return ", ".join(texts)
    if origin is tuple:
        return "a list of texts"
    if origin is dict:
        return "names with numbers"
    return "none" if hint is type(None) else str(getattr(hint, "__name__", hint))
