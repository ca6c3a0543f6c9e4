"""What a model is, apart from its weights: classes, code, configuration, what is frozen."""

from __future__ import annotations

import dataclasses
import re
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from unbroken.capture import named_modules, named_parameters, unwrapped
from unbroken.fingerprint.plain import Plain, plain_attributes, plain_items
from unbroken.fingerprint.source import is_users_own, qualified_name, source_digest

_OF_EVERY_MODULE = {*vars(nn.Module()), "config"}
_OWN_TO_A_FILE = {"_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype"}


def model_facts(model: nn.Module) -> dict[str, Plain]:
    """Return what the training of a model depends on besides its state.

    Names, shapes, dtypes and ties of its tensors are part of each checkpoint already, and are
    checked there one by one.

    Returns:
        `class`; `source`: by name of each of the user's own classes in it, a digest of its code
        but for `__init__`, whose work is seen in the rest; `layer`: by name of each module, its
        class and what it prints of itself; `frozen`: the names of the parameters that are not
        trained; and under their own names the values of its own configuration, if it has one,
        and the values and functions in the user's own modules, such as a number of heads.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        >>> _ = model[0].bias.requires_grad_(False)
        >>> facts = model_facts(model)
        >>> facts["class"], facts["frozen"]
        ('torch.nn.modules.container.Sequential', ['0.bias'])
    """
    model = unwrapped(model)
    return {
        **_attributes(model),
        **_config(model),
        "class": qualified_name(model),
        "source": _sources(model),
        "layer": {name: _printed(module) for name, module in named_modules(model) if name},
        "frozen": [*sorted({n for n, p in named_parameters(model) if not p.requires_grad})],
    }


def _sources(model: nn.Module) -> dict[str, Plain]:
    classes = {type(module) for _, module in named_modules(model)}
    own = sorted((c for c in classes if is_users_own(c)), key=qualified_name)
    return {qualified_name(one): source_digest(one, leave_out="__init__") for one in own}


def _config(model: nn.Module) -> dict[str, Plain]:
    """Return the model's own configuration: a Hugging Face one, a dataclass, a namespace."""
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "to_dict", None)):
        values = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = dataclasses.asdict(config)
    else:
        values = config if isinstance(config, dict) else plain_attributes(config)
    named = {str(name): value for name, value in values.items()}
    return plain_items({n: value for n, value in named.items() if n not in _OWN_TO_A_FILE})


def _attributes(model: nn.Module) -> dict[str, Plain]:
    """Return the values of modules whose class does not print them itself."""
    return {
        f"{name}.{key}" if name else key: value
        for name, module in named_modules(model)
        if is_users_own(type(module))
        for key, value in _values(module).items()
    }


def _values(module: nn.Module) -> dict[str, Plain]:
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    functions = {
        name: source_digest(value) or qualified_name(value)
        for name, value in own.items()
        if isinstance(value, FunctionType | BuiltinFunctionType)
    }
    return {**plain_items(own), **functions}


def _printed(module: nn.Module) -> str:
    """Return what a module prints of itself, without its parts."""
    text = re.sub(r" at 0x[0-9a-f]+", "", module.extra_repr())  # an address is not the same twice
    return f"{type(module).__name__}({text})"
