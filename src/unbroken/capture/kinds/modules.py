"""Modules: every parameter and buffer by the name it has in the bare model, modes, extra state.

Also the files beside the weights that `from_pretrained` needs.
"""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from unbroken.capture.codec.leaves import TensorLayout, TensorRef, physical, resolve_aliases
from unbroken.capture.state_taken_back import NotTakenBack, give_back
from unbroken.capture.state_tree import (
    Captured,
    Mismatch,
    State,
    is_named,
    is_names,
    raise_all,
    refuse_sharded,
)
from unbroken.capture.stored_tensor import (
    Filling,
    StoredSubclass,
    StoredTensor,
    describe,
    load_tensors,
)
from unbroken.capture.tensors import (
    class_of,
    comes_apart,
    dtype_name,
    is_sharded,
    parts_of,
    same_layout,
)
from unbroken.errors import CaptureError, ConfigError
from unbroken.store.format.names import is_file_name
from unbroken.stored_names import stored_class_name

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""Torch's transparent wrappers by class name (importing them is slow), and what they wrap."""

_Modules = Iterable[tuple[str, nn.Module]]


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module itself, without torch.compile, DDP and the like around it."""
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def _inner(module: nn.Module) -> nn.Module | None:
    kind = type(module)
    if kind.__module__.partition(".")[0] != "torch" or kind.__name__ not in _WRAPPERS:
        return None
    inner = module._modules[_WRAPPERS[kind.__name__]]  # noqa: SLF001 (keeps None and repeats)
    return inner if isinstance(inner, nn.Module) else None


def named_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules by their names in the bare model; a wrapper has that of what it wraps."""
    todo = [(name, module)]
    while todo:
        name, module = todo.pop()
        yield name, module
        inner = _inner(module)
        children = module._modules if inner is None else {"": inner}  # noqa: SLF001 (keeps repeats)
        todo += [
            (name if not part else f"{name}.{part}" if name else part, child)
            for part, child in reversed(children.items())
            if child is not None
        ]


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters by their names in the bare model; tied ones under each name."""
    return _parameters_of(named_modules(module))


def _parameters_of(modules: _Modules) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, owner in modules:
        for name, parameter in owner._parameters.items():  # noqa: SLF001 (no duplicates removed)
            if parameter is not None:
                yield f"{prefix}.{name}" if prefix else name, parameter


def named_buffers(module: nn.Module, *, persistent: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the persistent or the other buffers by their names in the bare model."""
    return _buffers_of(named_modules(module), persistent=persistent)


def _buffers_of(modules: _Modules, *, persistent: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, owner in modules:
        others = owner._non_persistent_buffers_set  # noqa: SLF001 (torch has no public name)
        for name, buffer in owner._buffers.items():  # noqa: SLF001 (no duplicates removed)
            if buffer is not None and (name not in others) == persistent:
                yield f"{prefix}.{name}" if prefix else name, buffer


def class_name(module: nn.Module) -> str:
    """Return the name of the bare module's class; a lazy one has that which it is to become."""
    kind = class_of(unwrapped(module))
    if issubclass(kind, LazyModuleMixin):
        kind = kind.cls_to_become or kind
    return stored_class_name(kind)


def capture_module(module: nn.Module, path: str, _names: object) -> State:
    """Return all of a module's state: tensors, modes, `requires_grad`, extra state."""
    modules = [*named_modules(module)]
    state: dict[str, torch.Tensor] = dict(_parameters_of(modules))
    state.update(_without_graph(_buffers_of(modules, persistent=True)))
    hidden = _without_graph(_buffers_of(modules, persistent=False))
    lazy = [name for space in (state, hidden) for name in _lazy_in(space)]
    for name in lazy:
        (state if name in state else hidden).pop(name)
    for name, owner in modules:
        _check_saves_only_tensors(owner, f"{path}.{name}" if name else path)
    extra = {name: owner.get_extra_state() for name, owner in _with_extra_state(modules).items()}
    refuse_sharded(extra, f"{path}:extra_state")
    facts = {
        "buffers": hidden,
        "eval": [name for name, training in _modes(modules).items() if not training],
        "extra_state": extra,
        **({"lazy": lazy} if lazy else {}),
    }
    return state, facts


def is_module_state(state: Any, facts: Mapping[str, Any]) -> bool:
    """Return whether a decoded state is what `capture_module` gives."""
    parts = (state, facts.get("buffers", {}), facts.get("extra_state", {}))
    return (
        all(map(is_named, parts))
        and all(hasattr(tensor, "shape") for part in parts[:2] for tensor in part.values())
        and is_names(facts.get("eval", []))
    )


def _lazy_in(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that have no shape until a first forward."""
    return [name for name, one in tensors.items() if is_lazy(one)]


def _without_graph(buffers: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: b if b.grad_fn is None else b.detach() for name, b in buffers}


def _modes(modules: _Modules) -> dict[str, bool]:
    return {name: owner.training for name, owner in modules}


def _with_extra_state(modules: _Modules) -> dict[str, nn.Module]:
    plain = nn.Module.get_extra_state
    return {n: owner for n, owner in modules if type(owner).get_extra_state != plain}


def _check_saves_only_tensors(owner: nn.Module, path: str) -> None:
    """Refuse a module that saves, in its own way, what is no parameter, buffer or extra state."""
    if type(owner)._save_to_state_dict is nn.Module._save_to_state_dict:  # noqa: SLF001
        return
    saved: dict[str, Any] = {}
    owner._save_to_state_dict(saved, "", keep_vars=True)  # noqa: SLF001 (torch's own protocol)
    known = {*owner._parameters, *owner._buffers, "_extra_state"}  # noqa: SLF001
    if unknown := sorted(set(saved) - known):
        raise CaptureError(
            path,
            f"{type(owner).__name__} saves more than parameters and buffers",
            found=", ".join(unknown),
            hint="return it from get_extra_state() and take it back in set_extra_state()",
        )


def check_module(
    module: nn.Module, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """Yield all that keeps the stored state from fitting the module."""
    live, saved = tensors_of(module), stored_tensors(stored)
    lazy = stored.facts.get("lazy", ())
    yield from _check_names({n: t for n, t in live.items() if n not in lazy}, saved, path, "tensor")
    for name in [name for name in lazy if name in live]:
        what = "has a shape here, and had none yet when the checkpoint was saved"
        yield Mismatch(f"{path}.{name}", what, found=describe(live[name]))
    common = {name: tensor for name, tensor in live.items() if name in saved}
    for name, tensor in common.items():
        yield from check_tensor_fits(tensor, saved[name], f"{path}.{name}")
    if not any(tensor.is_meta for tensor in live.values()):
        yield from _check_ties(common, saved, path)
    known = dict(named_modules(module))
    deleted = [name for name in stored.facts.get("eval", ()) if name not in known]
    yield from (Mismatch(f"{path}.{name}", "no such module is here") for name in deleted)
    extra = stored.facts.get("extra_state", {})
    yield from _check_names(_with_extra_state(named_modules(module)), extra, path, "extra state")


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers of a module that have a shape, by name."""
    tensors = _with_lazy_ones(module)
    lazy = _lazy_in(tensors)
    return {name: one for name, one in tensors.items() if name not in lazy} if lazy else tensors


def lazy_tensors(module: nn.Module) -> dict[str, Any]:
    """Return the parameters and buffers that get their shapes in the module's first forward."""
    tensors = _with_lazy_ones(module)
    return {name: tensors[name] for name in _lazy_in(tensors)}


def _with_lazy_ones(module: nn.Module) -> dict[str, torch.Tensor]:
    modules = [*named_modules(module)]
    tensors: dict[str, torch.Tensor] = dict(_parameters_of(modules))
    for persistent in (True, False):
        tensors.update(_buffers_of(modules, persistent=persistent))
    return tensors


def stored_tensors(stored: Captured) -> dict[str, Any]:
    """Return what a checkpoint has of a module's parameters and buffers, by name."""
    return {**stored.state, **stored.facts.get("buffers", {})}


def _check_names(
    live: Mapping[str, object], saved: Mapping[str, object], path: str, noun: str
) -> Iterator[Mismatch]:
    for name in live:
        if name not in saved:
            yield Mismatch(f"{path}.{name}", f"the checkpoint has no such {noun}")
    for name in saved:
        if name not in live:
            yield Mismatch(f"{path}.{name}", f"no such {noun} is here", expected=saved[name])


def check_tensor_fits(tensor: torch.Tensor, saved: object, path: str) -> Iterator[Mismatch]:
    """Yield why a stored tensor cannot be copied into a live one, if it cannot."""
    if isinstance(saved, StoredSubclass) or comes_apart(tensor):
        yield from _check_parts_fit(tensor, saved, path)
    elif not isinstance(saved, StoredTensor):
        yield Mismatch(path, "is no tensor in the checkpoint", found=describe(tensor))
    elif tensor.is_meta:
        yield Mismatch(path, "has no memory: it is on the meta device", expected=saved)
    elif (tensor.dtype, tuple(tensor.shape)) != (saved.dtype, saved.shape):
        yield Mismatch(path, "has another shape or dtype", saved, describe(tensor))
    elif not _same_strides(tensor, saved):
        yield Mismatch(path, "has other strides", saved.view.stride, tensor.stride())


def _check_parts_fit(tensor: torch.Tensor, saved: object, path: str) -> Iterator[Mismatch]:
    """Yield why the inner tensors of a stored tensor cannot be copied into those of a live one."""
    if not isinstance(saved, StoredSubclass) or saved.kind is not type(tensor):
        yield Mismatch(path, "is a tensor of another class", saved, class_of_tensor(tensor))
        return
    if (tensor.dtype, tuple(tensor.shape)) != (saved.dtype, saved.shape):
        yield Mismatch(path, "has another shape or dtype", saved, describe(tensor))
        return
    parts, context = parts_of(tensor)
    if parts.keys() != saved.parts.keys() or context != saved.context:
        yield Mismatch(path, "is made in another way", saved.context, context)
        return
    for name, part in saved.parts.items():
        if (part is None) != (parts[name] is None):
            yield Mismatch(f"{path}.{name}", "is not there on one of the two sides")
        elif part is not None:
            yield from check_tensor_fits(parts[name], part, f"{path}.{name}")


def class_of_tensor(tensor: torch.Tensor) -> str:
    """Return the class of a tensor, with dtype and shape."""
    return f"{type(tensor).__name__} {describe(tensor)}"


def _same_strides(tensor: torch.Tensor, saved: StoredTensor) -> bool:
    """Return whether both lie in memory alike; only dense ones come back as they were."""
    if is_sharded(tensor):
        return True  # a part is laid out as the ranks agreed, not as it was stored
    both_dense = TensorLayout.of(tensor).is_dense and saved.view.is_dense
    return not both_dense or same_layout(saved.shape, saved.view.stride, tensor.stride())


def _check_ties(
    live: Mapping[str, torch.Tensor], saved: Mapping[str, Any], path: str
) -> Iterator[Mismatch]:
    """Yield each group of tensors that shares memory on one side only."""
    here = _groups(_leaf_of(live))
    there = _groups({n: s.path for n, s in saved.items() if n in live and hasattr(s, "path")})
    yield from _untied(there, here, path, "are tied in the checkpoint, but not here")
    yield from _untied(here, there, path, "are tied here, but not in the checkpoint")


def _leaf_of(live: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return for each tensor the name of what holds its memory; of sharded ones, the first name."""
    whole = {
        name: tensor
        for name, tensor in live.items()
        if not is_sharded(tensor) and not comes_apart(tensor)
    }
    seen = [TensorRef.of(name, physical(tensor)) for name, tensor in whole.items()]
    first: dict[int, str] = {}
    return {
        **{s.path: where.leaf for s, where in zip(seen, resolve_aliases(seen), strict=True)},
        **{n: first.setdefault(id(t), n) for n, t in live.items() if n not in whole},
    }


def _untied(
    tied: set[frozenset[str]], others: set[frozenset[str]], path: str, what: str
) -> Iterator[Mismatch]:
    for group in sorted(tied, key=sorted):
        if not any(group <= other for other in others):
            yield Mismatch(f"{path}: {', '.join(sorted(group))}", what)


def _groups(leaf_of: Mapping[str, str]) -> set[frozenset[str]]:
    names: defaultdict[str, set[str]] = defaultdict(set)
    for name, leaf in leaf_of.items():
        names[leaf].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def restore_module(
    module: nn.Module, stored: Captured, _names: object, later: Filling
) -> list[NotTakenBack]:
    """Fill a module in place; tensors, ties and the identity of parameters are kept."""
    saved = stored_tensors(stored)
    done: set[tuple[object, ...]] = set()
    for name, tensor in tensors_of(module).items():
        if saved[name].view_key not in done:
            done.add(saved[name].view_key)
            saved[name].copy_into(tensor, later)
        if tensor.is_leaf and tensor.requires_grad != saved[name].requires_grad:
            tensor.requires_grad_(saved[name].requires_grad)
    in_eval = set(stored.facts.get("eval", ()))
    for name, owner in named_modules(module):
        owner.training = name not in in_eval
    with_extra_state = _with_extra_state(named_modules(module))
    if with_extra_state:
        later.finish()
    lost: list[NotTakenBack] = []
    for name, owner in with_extra_state.items():
        given = load_tensors(stored.facts["extra_state"][name])
        found = give_back(owner, given, owner.set_extra_state, owner.get_extra_state)
        lost += [replace(one, path=f".{name}.extra_state{one.path}") for one in found]
    return lost


# Gradients that wait for the next optimizer step, by the names of their parameters.


Parameters = nn.Module | Mapping[str, torch.Tensor]
"""A module, or parameters by name."""

Gradient = torch.Tensor | StoredTensor


def capture_gradients(parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return the gradients by parameter name; parameters without one are left out.

    Args:
        parameters: A module, or parameters by name.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model.weight.grad = torch.ones(1, 2)
        >>> capture_gradients(model)
        {'weight': tensor([[1., 1.]])}
    """
    return {name: p.grad for name, p in _by_name(parameters).items() if p.grad is not None}


def restore_gradients(parameters: Parameters, tree: Mapping[str, Gradient]) -> None:
    """Give every parameter exactly the gradient captured; none where there was none.

    Args:
        parameters: A module, or parameters by name.
        tree: What `capture_gradients` returned; its tensors may be stored ones.

    Raises:
        StateMismatchError: A gradient has no parameter here, or another shape; nothing was changed.
    """
    live = _by_name(parameters)
    check_gradients(parameters, tree)
    for name, parameter in live.items():
        stored = tree.get(name)
        if stored is None:
            parameter.grad = None
        elif parameter.grad is not None and _fits(parameter.grad, stored):
            _copy(stored, parameter.grad)
        else:
            parameter.grad = _new(stored, parameter)


def check_gradients(parameters: Parameters, tree: Mapping[str, Gradient]) -> None:
    """Raise where `restore_gradients` would.

    Raises:
        StateMismatchError: A gradient has no parameter here, or another shape.
    """
    raise_all(_check(_by_name(parameters), tree))


def _by_name(parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return each parameter once, under its first name."""
    pairs = (
        named_parameters(parameters) if isinstance(parameters, nn.Module) else parameters.items()
    )
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, parameter in pairs:
        first.setdefault(id(parameter), (name, parameter))
    return dict(first.values())


def _check(live: Mapping[str, torch.Tensor], tree: Mapping[str, Gradient]) -> Iterator[Mismatch]:
    for name, stored in tree.items():
        if name not in live:
            yield Mismatch(f"gradients.{name}", "no such parameter is here")
        elif tuple(stored.shape) != tuple(live[name].shape):
            expected = stored if isinstance(stored, StoredTensor) else describe(stored)
            here = describe(live[name])
            yield Mismatch(f"gradients.{name}", "has another shape", expected, here)


def _fits(gradient: torch.Tensor, stored: Gradient) -> bool:
    """Return whether a gradient can be filled in place, as views on DDP's buckets must be."""
    stride = stored.view.stride if isinstance(stored, StoredTensor) else stored.stride()
    same = (gradient.dtype, tuple(gradient.shape)) == (stored.dtype, tuple(stored.shape))
    return same and gradient.stride() == stride


def _copy(stored: Gradient, gradient: torch.Tensor) -> None:
    if isinstance(stored, StoredTensor):
        stored.copy_into(gradient)
    else:
        gradient.detach().copy_(stored)


def _new(stored: Gradient, parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(stored, StoredTensor):
        return stored.load_like(parameter)
    return stored.detach().to(parameter.device, copy=True)


# The files beside the weights that `from_pretrained` needs: of a model, and of its tokenizer.


def pretrained_files(model: object) -> dict[str, bytes]:
    """Return config.json and generation_config.json of a Hugging Face model; else nothing.

    A model is one if it has a `config` with `to_json_string()`; transformers is not imported, and
    the live configuration is not changed.

    Args:
        model: Any object; wrappers such as DDP are looked through.

    Returns:
        By file name, the bytes.

    Raises:
        CaptureError: The configuration holds what cannot be written.

    Example:
        >>> pretrained_files(nn.Linear(2, 1))
        {}
    """
    if not isinstance(model, nn.Module):
        return {}
    model = unwrapped(model)
    try:
        config = getattr(model, "config", None)
    except Exception:  # a property of the user's, and so of no Hugging Face model
        return {}
    if not callable(getattr(type(config), "to_json_string", None)):
        return {}
    try:
        return _files(model, config)
    except Exception as error:
        raise CaptureError(
            "model.config",
            "cannot be written for from_pretrained",
            found=f"{type(error).__name__}: {error}",
            hint="a configuration holds plain values: numbers, texts, lists and dicts of them",
        ) from error


def files_of_processor(processor: object) -> dict[str, bytes]:
    """Return the files that a tokenizer, or another processor of Hugging Face, saves itself in.

    Args:
        processor: Anything with `save_pretrained(folder)`.

    Returns:
        By file name, the bytes; without folders in the folder.

    Raises:
        ConfigError: It has no such method.

    Example:
        >>> files_of_processor("gpt2")
        Traceback (most recent call last):
            ...
        unbroken.errors.ConfigError: processing_class: expected save_pretrained(folder), found str
    """
    save = getattr(processor, "save_pretrained", None)
    if not callable(save):
        expected, found = "save_pretrained(folder)", type(processor).__name__
        raise ConfigError("processing_class", expected=expected, found=found)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and is_file_name(path.name)
        }


def _files(model: nn.Module, config: Any) -> dict[str, bytes]:
    files = {"config.json": _config(model, config)}
    generation = getattr(model, "generation_config", None)
    can_generate = getattr(model, "can_generate", None)
    if callable(can_generate) and can_generate() and generation is not None:
        files["generation_config.json"] = generation.to_json_string().encode()
    return files


def _config(model: nn.Module, config: Any) -> bytes:
    """Return the configuration as `save_pretrained` writes it, with the class and the dtype."""
    config = copy.deepcopy(config)
    config.architectures = [class_of(model).__name__]
    dtype = getattr(model, "dtype", None)
    if dtype is not None:
        config.dtype = dtype_name(dtype)
    text: str = config.to_json_string()
    return text.encode()
