"""What models, optimizers, schedules and the user's own objects are, apart from their state."""

from __future__ import annotations

import dis
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.capture import PREPARE, class_of, named_modules, named_parameters, unwrapped
from unbroken.fingerprint.source_code import (
    called_by,
    functions_of,
    is_user_code,
    qualified_name,
    source_digest,
)
from unbroken.fingerprint.values import (
    NOT_COMPARED,
    OWN_TO_A_START,
    Plain,
    callable_facts,
    facts_of,
    facts_of_items,
    names_used_by,
    plain_attributes,
    plain_items,
    values_around,
)
from unbroken.introspection import Failed, attributes_of, safe_call, safe_getattr, try_call
from unbroken.stored_names import stored_class_name

# Hooks that a user has put on modules, parameters and optimizers: they run in every step.


ON_MODULES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
ON_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
ON_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


_NOT_THE_USERS = ("unbroken.", "torch.distributed.")  # how ranks share a model is no part of it


def hooks_on(thing: object, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return the hooks on an object by kind, without those of FSDP2 and of unbroken.

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


# What an optimizer and a schedule are as they were built, before training moved them.


_MOVED = {"params", "param_names", "lr", "initial_lr"}
_MOVING = {"_last_lr", "_schedulers", "lr_lambdas"}
_STATE = {"defaults", "param_groups", "state"}
_NO_SETTINGS = {"base_lrs", "last_epoch", "verbose"}


def optimizer_facts(optimizer: Optimizer) -> dict[str, Plain]:
    """Return the class of an optimizer and its hyperparameters.

    A hyperparameter that is the same in all groups stands alone, else as a list by group. The
    learning rate is the one that schedules start from.

    Example:
        >>> import torch
        >>> weight, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
        >>> groups = [{"params": [weight], "weight_decay": 0.1}, {"params": [bias]}]
        >>> facts = optimizer_facts(torch.optim.SGD(groups, lr=0.5))
        >>> facts["lr"], facts["weight_decay"]
        (0.5, [0.1, 0])
    """
    groups = [_options(group) for group in optimizer.param_groups]
    names = sorted({name for group in groups for name in group})
    options = {name: _merged([group.get(name) for group in groups]) for name in names}
    facts = {"class": qualified_name(type(optimizer)), **_own_facts(optimizer), **options}
    return {**facts, **facts_of_items(hooks_on(optimizer, ON_OPTIMIZERS))}


def _own_facts(optimizer: Optimizer) -> dict[str, Plain]:
    """Return the code and the settings of an optimizer of the user's own class."""
    if not is_user_code(type(optimizer)):
        return {}
    public = {n: v for n, v in attributes_of(optimizer).items() if not n.startswith("_")}
    settings = {n: v for n, v in public.items() if n not in _STATE}
    return {"source": source_digest(type(optimizer)), **facts_of_items(settings)}


def _options(group: dict[str, Any]) -> dict[str, Plain]:
    own = {name: value for name, value in group.items() if name not in _MOVED}
    return plain_items({**own, "lr": group.get("initial_lr", group["lr"])})


def _merged(values: list[Plain]) -> Plain:
    return values[0] if all(value == values[0] for value in values) else values


def scheduler_facts(scheduler: LRScheduler) -> dict[str, Plain]:
    """Return the class of a schedule, its settings, and the code of its functions.

    Learning rates are the optimizer's facts, and where the schedule stands is state: neither
    counts here.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler_facts(torch.optim.lr_scheduler.StepLR(optimizer, step_size=30))["step_size"]
        30
    """
    facts: dict[str, Plain] = {"class": qualified_name(scheduler)}
    if is_user_code(type(scheduler)):
        facts["source"] = source_digest(scheduler)
    settings = plain_attributes(scheduler).items()
    facts |= {name: value for name, value in settings if name not in _NO_SETTINGS}
    facts |= facts_of_items(_more_settings(scheduler))
    for index, function in enumerate(getattr(scheduler, "lr_lambdas", ())):
        facts[f"lr_lambdas.{index}"] = callable_facts(function)
    for index, inner in enumerate(getattr(scheduler, "_schedulers", ())):
        facts[f"schedulers.{index}"] = scheduler_facts(inner)
    return facts


def _more_settings(scheduler: LRScheduler) -> dict[str, Any]:
    """Return milestones and functions of a schedule, which are no plain public values."""
    own = {n: v for n, v in attributes_of(scheduler).items() if n not in _MOVING}
    found: dict[str, Any] = {
        n: v for n, v in own.items() if n.startswith("_") and isinstance(v, list | str)
    }
    found |= {n: v for n, v in own.items() if isinstance(v, Counter)}
    return found | {n: v for n, v in own.items() if callable(v) and n not in ("step", "optimizer")}


# What the user's own classes keep in their objects: attributes that no library manages.


_STORE, _STORE_GLOBAL = dis.opmap["STORE_ATTR"], dis.opmap["STORE_GLOBAL"]
_MORE = dis.opmap["EXTENDED_ARG"]
_IN_EVERY_MODULE = frozenset(vars(nn.Module()))


def keeps_attributes(thing: object) -> bool:
    """Return whether the class of an object is the user's own.

    Example:
        >>> keeps_attributes(nn.Linear(1, 1)), keeps_attributes([])
        (False, False)
    """
    return _is_own(_class_of(thing))


def own_attributes(thing: object) -> dict[str, Any]:
    """Return what an object of the user's own class holds, without what a library manages.

    A name that code of a library's base class sets is the library's, and so is a private name
    that no code of the user's sets.

    Example:
        >>> own_attributes(nn.Linear(1, 1))  # all are those of the library
        {}
    """
    managed, private = _names_of(_class_of(thing))
    return {
        name: value
        for name, value in attributes_of(thing).items()
        if name not in managed and (name[:1] != "_" or name in private)
    }


def changed_by_reading(data: object) -> tuple[frozenset[str], frozenset[str]]:
    """Return which attributes of a data set its own reading counts on, and to which it adds.

    What it only sets, once, is rather made when it is first needed.

    Example:
        >>> changed_by_reading([1, 2])
        (frozenset(), frozenset())
    """
    return _changed_by_reading(_class_of(data))


def names_in_class(thing: object, name: str) -> bool:
    """Return whether code of an object's class names something, such as what ends a run.

    Example:
        >>> class Patience:
        ...     def on_step_end(self, trainer):
        ...         trainer.stop("enough")
        >>> names_in_class(Patience(), "stop"), names_in_class(Patience(), "save")
        (True, False)
    """
    values = (value for base in type(thing).__mro__[:-1] for value in vars(base).values())
    return any(name in code.co_names for value in values for code in _codes(value))


def names_stored_by(function: FunctionType) -> frozenset[str]:
    """Return the names of globals and attributes that a function sets, inner functions included.

    Example:
        >>> def count():
        ...     global counted
        ...     counted += 1
        >>> sorted(names_stored_by(count))
        ['counted']
    """
    return _stored_in(function.__code__)


@functools.lru_cache(maxsize=4096)
def _stored_in(code: CodeType) -> frozenset[str]:
    each = ((one, store) for one in _with_inner(code) for store in (_STORE, _STORE_GLOBAL))
    return frozenset(name for one, store in each for name in _stored_by(one, store))


@functools.lru_cache(maxsize=256)
def _changed_by_reading(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    functions: dict[str, Any] = {}
    for base in reversed([base for base in kind.__mro__ if _is_own(base)]):
        functions |= vars(base)
    todo, seen = [*_READING], set[str]()
    sets, adds = set[str](), set[str]()
    while todo:
        name = todo.pop()
        if name in seen or name not in functions:
            continue
        seen.add(name)
        for code in _codes(functions[name]):
            sets |= {*_counted_by(code)}
            adds |= {*_added_to_by(code)}
            todo += [other for other in code.co_names if other in functions]
    return frozenset(sets), frozenset(adds - sets)


_READING = ("__getitem__", "__getitems__", "__iter__", "__next__", "__call__")
_ADDING = frozenset({"append", "appendleft", "extend", "add", "insert", "update"})


def _counted_by(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes that a line of code computes from what they were."""
    lines: dict[int | None, list[dis.Instruction]] = {}
    for step in dis.get_instructions(code):
        lines.setdefault(step.positions.lineno if step.positions else None, []).append(step)
    for steps in lines.values():
        if any(step.opname == "BINARY_OP" for step in steps):
            loaded = {step.argval for step in steps if step.opname in _LOADS}
            stored = {step.argval for step in steps if step.opname == "STORE_ATTR"}
            yield from loaded & stored


def _added_to_by(code: CodeType) -> Iterator[str]:
    """Yield the names of attributes whose method that adds something code calls."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname in _LOADS]
    yield from (one for one, method in itertools.pairwise(names) if method in _ADDING)


_LOADS = ("LOAD_ATTR", "LOAD_METHOD")


def _class_of(thing: object) -> Any:
    return class_of(thing) if isinstance(thing, nn.Module) else type(thing)


@functools.lru_cache(maxsize=1024)
def _is_own(kind: Any) -> bool:
    return is_user_code(kind)


@functools.lru_cache(maxsize=1024)
def _names_of(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that libraries manage in objects of a class, and those that its user sets.

    Where a class has no base of a library but `object`, all is the user's.
    """
    bases = [base for base in kind.__mro__ if base is not object]
    own = [base for base in bases if _is_own(base)]
    others = [base for base in bases if base not in own]
    managed = set(OWN_TO_A_START).union(*map(_names_in, others)) if others else set()
    managed |= _IN_EVERY_MODULE if issubclass(kind, nn.Module) else set()
    private = frozenset().union(*map(_names_in, own))
    if not others:
        private |= {name for one in own for name in vars(one)}
        managed -= private
    return frozenset(managed), private


def _names_in(kind: type) -> frozenset[str]:
    """Return all names of a class, and those of attributes that its code sets."""
    codes = [code for value in vars(kind).values() for code in _codes(value)]
    stored = (name for code in codes for name in _stored_by(code))
    slots = vars(kind).get("__slots__", ())
    return frozenset({*stored, *((slots,) if isinstance(slots, str) else slots)})


def _codes(value: object) -> Iterator[CodeType]:
    if isinstance(value, property):
        parts: list[Any] = [value.fget, value.fset, value.fdel]
    elif isinstance(value, staticmethod | classmethod):
        parts = [value.__func__]
    else:
        parts = [value]
    for function in parts:
        while isinstance(function, FunctionType):
            yield from _with_inner(function.__code__)
            function = vars(function).get("__wrapped__")


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _with_inner(inner)


def _stored_by(code: CodeType, store: int = _STORE) -> Iterator[str]:
    """Yield the names of the attributes that code sets, of whatever object; or of the globals."""
    text, at = code.co_code, 0
    while (at := text.find(store, at)) >= 0:
        if at % 2 == 0:
            more = text[at - 1] << 8 if at and text[at - 2] == _MORE else 0
            yield code.co_names[more | text[at + 1]]
        at += 1


# What a user's subclass of a trainer does in a step: its code, and the settings that this uses.


def subclass_facts(thing: object, *, leave_out: frozenset[str]) -> dict[str, Plain]:
    """Return what the user's own classes of an object do, and the settings that they use for it.

    Attributes count as they are now: what training will have made of them is no setting.

    Args:
        thing: An object whose base class is a library's.
        leave_out: Methods that the training does not depend on.

    Example:
        >>> import ast
        >>> subclass_facts(ast.NodeVisitor(), leave_out=frozenset())  # all of it is a library's
        {'classes': [], 'source': {}, 'globals': {}, 'values': {}}
    """
    kinds = [one for one in type(thing).__mro__ if functions_of(one, leave_out)]
    named = {qualified_name(one): one for one in kinds}
    around = {name: values_around(one, leave_out) for name, one in named.items()}
    used = names_used_by(*kinds, leave_out=leave_out) if kinds else set()
    own = own_attributes(thing).items()
    settings = {n: value for n, value in own if n in used and _is_setting_of_a_trainer(value)}
    source: dict[str, Plain] = {n: source_digest(k, leave_out=leave_out) for n, k in named.items()}
    return {
        "classes": [*named],
        "source": source,
        "globals": {name: values for name, values in around.items() if values},
        "values": facts_of_items(settings, used=used),
    }


def _is_setting_of_a_trainer(value: object) -> bool:
    """Return whether a value is no object of a library, such as a writer, and no network."""
    if isinstance(value, torch.nn.Module):
        return next(value.parameters(), None) is None
    plain = (bool, int, float, str, list, tuple, set, dict, torch.Tensor, torch.dtype)
    return isinstance(value, plain) or callable(value) or is_user_code(type(value))
