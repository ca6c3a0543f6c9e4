"""Models whose tensors come, or change their shapes, in training: a resume builds what was grown.

A start builds a model as it was at the beginning of the run. What has grown since is in the
checkpoint: lazy modules have their shapes, buffers are longer, parameters were added, and the
optimizer has them in its groups. Before such a checkpoint is loaded, the live objects are given
its structure; where nobody can tell how, they stay, and the mismatch is told as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import xxhash
from torch import nn
from torch.optim import Optimizer

from unbroken.capture.kinds.modules import (
    lazy_tensors,
    named_modules,
    stored_tensors,
    tensors_of,
    unwrapped,
)
from unbroken.capture.kinds.optimizers import ParameterNames
from unbroken.capture.state_tree import Captured
from unbroken.capture.stored_tensor import StoredTensor, load_tensors
from unbroken.capture.tensor_subclasses import comes_apart, is_sharded

PREPARE = "prepare_to_load"
"""The method by which a module of the user's own brings itself to a stored structure."""


def structure_digest(value: nn.Module | Optimizer, names: ParameterNames) -> str:
    """Return a digest of how a module or an optimizer was built: names, shapes, groups.

    Args:
        value: The module or the optimizer.
        names: The names of all parameters.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 3)
        >>> names = ParameterNames({})
        >>> structure_digest(one, names) == structure_digest(other, names)
        False
    """
    if isinstance(value, Optimizer):
        groups = [[names.of(one) for one in group["params"]] for group in value.param_groups]
        return xxhash.xxh3_128_hexdigest(repr(groups).encode())
    lazy = {name: str(tensor.dtype) for name, tensor in lazy_tensors(value).items()}
    plain = {n: (tuple(one.shape), str(one.dtype)) for n, one in tensors_of(value).items()}
    text = repr([sorted(lazy.items()), sorted(plain.items())])
    return xxhash.xxh3_128_hexdigest(text.encode())


class Growth:
    """Gives live objects the structure of a checkpoint, and can take it back.

    Args:
        objects: The live objects by name.
        is_as_built: Tells by the path of an object whether this start has built it as the one
            did that made the checkpoint. Then all that differs has come in training.
    """

    def __init__(
        self, objects: Mapping[str, object], is_as_built: Callable[[str], bool] = lambda _: False
    ) -> None:
        self._objects = objects
        self._is_as_built = is_as_built
        self._undo: list[Callable[[], object]] = []

    def take_back(self) -> None:
        """Give the objects the structure that they had, unless `keep` was called."""
        while self._undo:
            self._undo.pop()()

    def keep(self) -> None:
        """Let the objects have what they were given."""
        self._undo.clear()

    def grow(self, tree: Mapping[str, Any]) -> None:
        """Give the objects the structure of this state; their contents stay.

        Args:
            tree: What `capture` returned, decoded with `lazy=True`.
        """
        try:
            self._grow(tree)
        except (ValueError, KeyError, TypeError):  # torch refuses it: so does the check, by name
            self.take_back()

    def _grow(self, tree: Mapping[str, Any]) -> None:
        pairs = list(_pairs(self._objects, tree, ""))
        for path, value, stored in pairs:
            if isinstance(value, nn.Module) and stored.kind == "module":
                hidden = frozenset(stored.facts.get("buffers", ()))
                self._grow_module(unwrapped(value), stored_tensors(stored), hidden, path)
        names = ParameterNames(self._objects)
        for path, value, stored in pairs:
            if isinstance(value, Optimizer) and stored.kind == "optimizer":
                self._grow_optimizer(value, stored.state["param_groups"], names, path)

    def _grow_module(
        self, module: nn.Module, saved: Mapping[str, Any], hidden: frozenset[str], path: str
    ) -> None:
        self._materialize(module, saved)
        if _fits(module, saved):
            return
        self._remember(module)
        _prepare(module, saved)
        self._materialize(module, saved)
        if not _fits(module, saved):
            self._take_by_itself(module, {n: t for n, t in saved.items() if n not in hidden})
        if not _fits(module, saved) and self._is_as_built(path):
            self._take_all(module, saved, hidden)

    def _materialize(self, module: nn.Module, saved: Mapping[str, Any]) -> None:
        """Give lazy modules the shapes that their first forward found; it finds them again."""
        for name, tensor in lazy_tensors(module).items():
            stored = saved.get(name)
            if isinstance(stored, StoredTensor):
                lazy = type(tensor)
                tensor.materialize(stored.shape, dtype=stored.dtype)
                self._undo.append(partial(_make_lazy_again, tensor, lazy))

    def _remember(self, module: nn.Module) -> None:
        """Keep what the module consists of, to put it back."""
        for _, owner in named_modules(module):
            spaces = (vars(owner)[name] for name in ("_parameters", "_buffers", "_modules"))
            for space in (*spaces, vars(owner)):
                self._undo.append(partial(_put_back, space, dict(space)))
            persistent = owner._non_persistent_buffers_set  # noqa: SLF001 (torch has no public name)
            self._undo.append(partial(_put_back_names, persistent, set(persistent)))

    def _take_by_itself(self, module: nn.Module, saved: Mapping[str, Any]) -> None:
        """Let modules with a way of their own to load a state take what does not fit."""
        for name, owner in list(named_modules(module)):
            prefix = f"{name}." if name else ""
            whole = type(owner).load_state_dict is not nn.Module.load_state_dict
            if not whole and not _loads_in_its_own_way(owner):
                continue
            mine = {n.removeprefix(prefix): one for n, one in saved.items() if n.startswith(prefix)}
            if not whole:
                mine = {n: one for n, one in mine.items() if "." not in n}
            if _fits(owner, mine, own=not whole):
                continue
            for tensor in tensors_of(owner).values():
                self._undo.append(partial(_set_memory, tensor, tensor.detach().clone()))
            state = load_tensors(mine, "cpu")
            with suppress(Exception):  # it may raise anything: then all is told as it is
                if whole:
                    owner.load_state_dict(state)
                else:
                    _load_own(owner, state)

    def _take_all(
        self, module: nn.Module, saved: Mapping[str, Any], hidden: frozenset[str]
    ) -> None:
        """Give each tensor its stored shape, and add those that are not there."""
        live, owners = tensors_of(module), dict(named_modules(module))
        for name, stored in saved.items():
            if not isinstance(stored, StoredTensor):
                continue
            tensor = live.get(name)
            owner_name, _, own = name.rpartition(".")
            if tensor is not None:
                self._take_shape(tensor, stored)
            elif owner_name in owners:
                is_hidden = name in hidden
                _add(owners[owner_name], own, stored, _device_of(module), is_hidden=is_hidden)

    def _take_shape(self, tensor: torch.Tensor, stored: StoredTensor) -> None:
        if (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shape):
            return
        if is_sharded(tensor) or comes_apart(tensor) or tensor.grad_fn is not None:
            return
        self._undo.append(partial(_set_memory, tensor, tensor.data))
        stride = stored.view.stride
        tensor.data = torch.empty_strided(
            stored.shape, stride, dtype=stored.dtype, device=tensor.device
        )

    def _grow_optimizer(
        self, optimizer: Optimizer, saved: Sequence[Any], names: ParameterNames, path: str
    ) -> None:
        """Give an optimizer the groups that it had, if it was built as it is here."""
        saved_names = [[names.find(name) for name in group["params"]] for group in saved]
        known = all(one is not None for group in saved_names for one in group)
        if not known or _grouped_alike(optimizer, saved_names) or not self._is_as_built(path):
            return
        before = [(group, list(group["params"])) for group in optimizer.param_groups]
        self._undo.append(partial(_regroup, optimizer, before))
        left = list(optimizer.param_groups)
        optimizer.param_groups.clear()
        for parameters, stored in zip(saved_names, saved, strict=True):
            group = _most_like(left, parameters)
            if group is not None:
                left = [one for one in left if one is not group]
                group["params"] = parameters
                optimizer.param_groups.append(group)
            else:
                options = {key: load_tensors(one) for key, one in stored.items() if key != "params"}
                optimizer.add_param_group({"params": parameters, **options})


def _pairs(live: Any, stored: Any, path: str) -> Iterator[tuple[str, object, Captured]]:
    """Yield the objects that both sides have, with their paths."""
    if isinstance(stored, Captured):
        yield path, live, stored
    elif type(live) is type(stored) and isinstance(live, dict | list | tuple):
        there = stored if isinstance(stored, dict) else dict(enumerate(stored))
        for key, value in live.items() if isinstance(live, dict) else enumerate(live):
            if key in there:
                yield from _pairs(value, there[key], f"{path}.{key}" if path else str(key))


def _fits(module: nn.Module, saved: Mapping[str, Any], *, own: bool = False) -> bool:
    """Return whether a module has just these tensors.

    Args:
        module: The module.
        saved: Stored tensors, by name.
        own: Whether those of its parts do not count.
    """
    live = tensors_of(module)
    if own:
        live = {name: tensor for name, tensor in live.items() if "." not in name}
    return live.keys() == saved.keys() and all(
        tuple(tensor.shape) == saved[name].shape and tensor.dtype == saved[name].dtype
        for name, tensor in live.items()
    )


def _prepare(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Call the hooks of modules, from the outermost to the innermost."""
    called: set[int] = set()
    while True:
        waiting = ((n, one) for n, one in named_modules(module) if hasattr(one, PREPARE))
        name, owner = next(((n, one) for n, one in waiting if id(one) not in called), ("", None))
        if owner is None:
            return
        called.add(id(owner))
        prefix = f"{name}." if name else ""
        shapes = {
            n.removeprefix(prefix): torch.empty(one.shape, dtype=one.dtype, device="meta")
            for n, one in saved.items()
            if n.startswith(prefix)
        }
        getattr(owner, PREPARE)(shapes)


def _loads_in_its_own_way(owner: nn.Module) -> bool:
    """Return whether a module loads its own tensors by more than torch's plain code."""
    plain = nn.Module._load_from_state_dict  # noqa: SLF001 (torch's own protocol)
    own = type(owner)._load_from_state_dict is not plain  # noqa: SLF001
    return own or bool(owner._load_state_dict_pre_hooks)  # noqa: SLF001


def _load_own(owner: nn.Module, state: dict[str, Any]) -> None:
    """Do for one module what `load_state_dict` does for it."""
    metadata = {"version": owner._version, "assign_to_params_buffers": False}  # noqa: SLF001
    owner._load_from_state_dict(state, "", metadata, True, [], [], [])  # noqa: SLF001


def _add(
    owner: nn.Module, name: str, stored: StoredTensor, device: torch.device, *, is_hidden: bool
) -> None:
    """Add a parameter or a buffer, as the module has come by it in training."""
    if name in vars(owner) or owner._parameters.get(name) is not None:  # noqa: SLF001
        return
    memory = torch.empty_strided(
        stored.shape, stored.view.stride, dtype=stored.dtype, device=device
    )
    if stored.role != "parameter":
        owner._buffers[name] = memory  # noqa: SLF001 (register_buffer refuses one that is None)
        if is_hidden:
            owner._non_persistent_buffers_set.add(name)  # noqa: SLF001
        return
    parameter = nn.Parameter(memory, requires_grad=stored.requires_grad)
    if isinstance(owner, nn.ParameterList):
        owner.append(parameter)
    elif isinstance(owner, nn.ParameterDict):
        owner[name] = parameter
    else:
        owner.register_parameter(name, parameter)


def _device_of(module: nn.Module) -> torch.device:
    return next((one.device for one in module.parameters()), torch.device("cpu"))


def _grouped_alike(optimizer: Optimizer, saved_names: Sequence[Sequence[Any]]) -> bool:
    """Return whether the groups are these, in whatever order."""
    here = sorted(sorted(id(one) for one in group["params"]) for group in optimizer.param_groups)
    return here == sorted(sorted(map(id, group)) for group in saved_names)


def _most_like(groups: Sequence[dict[str, Any]], parameters: Sequence[Any]) -> Any:
    """Return the group with most of these parameters; None if none has any."""
    ids = {id(one) for one in parameters}
    counts = [sum(id(one) in ids for one in group["params"]) for group in groups]
    return groups[counts.index(max(counts))] if any(counts) else None


def _regroup(optimizer: Optimizer, before: Sequence[tuple[dict[str, Any], list[Any]]]) -> None:
    for group, parameters in before:
        group["params"] = parameters
    optimizer.param_groups[:] = [group for group, _ in before]


def _set_memory(tensor: torch.Tensor, memory: torch.Tensor) -> None:
    tensor.data = memory


def _put_back(space: dict[str, Any], before: Mapping[str, Any]) -> None:
    space.clear()
    space.update(before)


def _put_back_names(names: set[str], before: set[str]) -> None:
    names.clear()
    names.update(before)


def _make_lazy_again(tensor: Any, kind: type) -> None:
    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    tensor.__class__ = kind
