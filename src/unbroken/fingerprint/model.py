"""What a model is, apart from its weights: classes, code, configuration, what is frozen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from unbroken.capture import PREPARE, class_of, named_modules, named_parameters, unwrapped
from unbroken.fingerprint.introspection import (
    Failed,
    attributes_of,
    safe_call,
    safe_getattr,
    try_call,
)
from unbroken.fingerprint.source_code import called_by, is_user_code, qualified_name, source_digest
from unbroken.fingerprint.values import (
    NOT_COMPARED,
    OWN_TO_A_START,
    Plain,
    facts_of,
    facts_of_items,
    names_used_by,
    values_around,
)
from unbroken.stored_names import stored_class_name

# Hooks that a user has put on modules, parameters and optimizers: they run in every step.


ON_MODULES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
ON_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
ON_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


_NOT_THE_USERS = ("unbroken.", "torch.distributed.")  # how ranks share a model is no part of it


def hooks_on(thing: object, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return the hooks on a thing by the name of their kind, but for those of FSDP2 and of ours.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1)
        >>> handle = layer.register_forward_hook(print)
        >>> hooks_on(layer, ON_MODULES)
        {'_forward_hooks': [<built-in function print>]}
    """
    found = {name: _own_hooks(safe_getattr(thing, name)) for name in names}
    return {name: hooks for name, hooks in found.items() if hooks}


def _own_hooks(hooks: Any) -> list[Any]:
    each = hooks.values() if isinstance(hooks, dict) else ()
    return [hook for hook in each if not _is_not_the_users(hook)]


def _is_not_the_users(hook: Any) -> bool:
    function, _ = called_by(hook)
    return str(safe_getattr(function, "__module__")).startswith(_NOT_THE_USERS)


_OF_A_MODULE_ON_RANKS = {
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
    "_distribute_module_applied",
}  # what `fully_shard` and tensor parallelism leave behind
_NOT_IN_A_STEP = frozenset({"__init__", PREPARE})
_OF_EVERY_MODULE = {*vars(nn.Module()), PREPARE, "config", *OWN_TO_A_START, *_OF_A_MODULE_ON_RANKS}
_ROOT = "(model)"
ATTENTION = "attn_implementation"


def model_facts(model: nn.Module) -> dict[str, Plain]:
    """Return what the training of a model depends on besides its state.

    Names, shapes, dtypes and ties of its tensors are part of each checkpoint already, and are
    checked there one by one.

    Returns:
        `class`; `source`: by name of each of the user's own classes in it, a digest of its code
        but for `__init__` and `prepare_to_load`, whose work is seen in the rest; `globals`: what
        that code takes from globals and closures; `layer`: by name of each module, its class,
        what it prints of itself and the numbers and functions in it; `frozen`: the names of the
        parameters that are not trained; `eval`: the modules in evaluation mode, if the model as a
        whole is not; and under their own names the values of its configuration, if it has one, and
        the hooks, values and functions in the user's own modules, such as a number of heads.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        >>> _ = model[0].bias.requires_grad_(False)
        >>> facts = model_facts(model)
        >>> facts["class"], facts["frozen"]
        ('torch.nn.modules.container.Sequential', ['0.bias'])
    """
    model = unwrapped(model)
    modules = dict(named_modules(model))
    own = {class_of(module) for module in modules.values() if is_user_code(class_of(module))}
    classes = sorted(own, key=qualified_name)
    around = {qualified_name(one): values_around(one, leave_out=_NOT_IN_A_STEP) for one in classes}
    return {
        **_attributes(modules, classes),
        **_configs(modules),
        "class": qualified_name(class_of(model)),
        "source": {qualified_name(o): source_digest(o, leave_out=_NOT_IN_A_STEP) for o in classes},
        "globals": {name: values for name, values in around.items() if values},
        "layer": {name or _ROOT: _printed(module) for name, module in modules.items()},
        **_in_evaluation_mode(modules),
        "frozen": [*sorted({n for n, p in named_parameters(model) if not p.requires_grad})],
    }


def _in_evaluation_mode(modules: dict[str, nn.Module]) -> dict[str, Plain]:
    """Return the parts that do not train, where the model as a whole does."""
    still = sorted(name for name, module in modules.items() if not module.training)
    return {"eval": [*still]} if still and "" not in still else {}


def _configs(modules: dict[str, nn.Module]) -> dict[str, Plain]:
    """Return the model's own configuration by its keys, and by module those of its parts."""
    found: dict[str, Plain] = {}
    taken: list[Any] = []
    for name, module in modules.items():
        config = try_call(getattr, module, "config", None)
        if isinstance(config, Failed):
            path = f"{name}.config" if name else "config"
            found[path] = f"{NOT_COMPARED}it raised {qualified_name(config.error)}"
        if config is None or isinstance(config, Failed) or any(config is one for one in taken):
            continue
        taken.append(config)
        facts = _config(config)
        if facts:
            found |= {f"{name}.config": facts} if name else facts
    return found


def _config(config: Any) -> dict[str, Plain]:
    """Return a configuration: a Hugging Face one, a dataclass, a namespace, a dictionary."""
    settings = safe_call(config, "to_dict")
    if isinstance(settings, dict):
        return facts_of_items({**settings, **_attention(config)})
    values = config if isinstance(config, dict) else attributes_of(config)
    return facts_of_items({n: v for n, v in values.items() if not str(n).startswith("_")})


def _attention(config: Any) -> dict[str, Any]:
    """Return the attention kernel that a Hugging Face model uses; `to_dict` leaves it out."""
    kernel = safe_getattr(config, "_attn_implementation")
    return {} if kernel is None else {ATTENTION: kernel}


def _attributes(modules: dict[str, nn.Module], classes: list[type]) -> dict[str, Plain]:
    """Return the values and hooks of modules whose class does not print them itself."""
    used = names_used_by(*classes, leave_out=_NOT_IN_A_STEP)
    parts = {id(module) for module in modules.values()}
    found: dict[str, Plain] = {}
    for name, module in modules.items():
        items: dict[str, Any] = {**hooks_on(module, ON_MODULES)}
        if is_user_code(class_of(module)):
            own = attributes_of(module).items()
            items |= {n: value for n, value in own if n not in _OF_EVERY_MODULE}
        for own_name, parameter in module.named_parameters(recurse=False):
            hooks = hooks_on(parameter, ON_PARAMETERS).items()
            items |= {f"{own_name}.{hook}": each for hook, each in hooks}
        if (patch := _patched(class_of(module))) is not None:
            items["forward"] = patch
        values = facts_of_items(items, used=used, exclude=parts)
        found |= {f"{name}.{key}" if name else key: value for key, value in values.items()}
    return found


def _patched(kind: type) -> Any:
    """Return the `forward` of an installed class that was put there from another module."""
    owner = next((base for base in kind.__mro__ if "forward" in vars(base)), kind)
    forward = vars(owner).get("forward")
    if is_user_code(owner) or not isinstance(forward, FunctionType):
        return None
    return None if forward.__module__ == owner.__module__ else forward


def _printed(module: nn.Module) -> str:
    """Return what a module prints of itself, without its parts, and what it does not print."""
    text = _same_twice(str(safe_call(module, "extra_repr") or ""))
    more = [] if is_user_code(class_of(module)) else _unprinted(module, text)
    return f"{stored_class_name(class_of(module))}({', '.join([text, *more] if text else more)})"


def _same_twice(text: str) -> str:
    """Return a text without addresses, and with sets in order."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return re.sub(r"\{([^{}:]*)\}", lambda m: f"{{{', '.join(sorted(m[1].split(', ')))}}}", text)


def _unprinted(module: nn.Module, printed: str) -> list[str]:
    """Return the numbers, texts and functions in an installed module that it does not print."""
    found = []
    for name, value in sorted(attributes_of(module).items()):
        if name in _OF_EVERY_MODULE or name.startswith("_") or not _is_setting(value):
            continue
        facts = value.__name__ if isinstance(value, BuiltinFunctionType) else facts_of(value)
        if isinstance(facts, dict) and facts.get("source") is None:
            facts = f"{facts['name']}{_spelled(facts['values']) if facts['values'] else ''}"
        text = f"{name}={_spelled(facts)}"
        if facts is not ... and text not in printed and f"{name}={value}" not in printed:
            found.append(text)
    return found


def _is_setting(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(one, bool | int | float | str) for one in value)
    kinds = bool | int | float | str | FunctionType | BuiltinFunctionType
    return isinstance(value, kinds)


def _spelled(facts: Any) -> str:
    return facts if isinstance(facts, str) else json.dumps(facts, sort_keys=True)
