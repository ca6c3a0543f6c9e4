"""Make a checkpoint and live objects fit each other, where they are not of one structure.

What a module gets in training, a start has not: lazy modules have their shapes in the checkpoint,
buffers are longer, parameters were added, and the optimizer has them in its groups. Before such a
checkpoint is loaded, the live objects get its structure (`Growth`); where nobody can tell how, they
stay as they are, and the mismatch is refused as any other. And what the user names keeps its live
state (`Skip`): of that, the live tree is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import torch
import xxhash
from torch import nn
from torch.optim import Optimizer

from unbroken.capture.codec.leaves import TensorLeaf
from unbroken.capture.codec.values import decode, encode
from unbroken.capture.kinds.modules import (
    lazy_tensors,
    named_modules,
    stored_tensors,
    tensors_of,
    unwrapped,
)
from unbroken.capture.kinds.optimizers import ParameterNames
from unbroken.capture.objects import capture
from unbroken.capture.state_tree import Captured, types_in
from unbroken.capture.stored_tensor import StoredTensor, load_tensors
from unbroken.capture.tensors import comes_apart, is_sharded
from unbroken.errors import ConfigError, StateMismatchError

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
            with suppress(Exception):  # it may raise anything: then the mismatch is refused
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


# A load in part: what `skip` names keeps its live state.


_MISSING = object()


@dataclass(frozen=True)
class Skip:
    """Names what is not loaded: objects ("optimizer"), or tensors and their optimizer state.

    A pattern (`fnmatch`) fits an object's name, a parameter's name ("lm_head.*"), or both
    together ("ema.lm_head.*", "optimizer.lm_head.*").

    Args:
        patterns: Each must fit something.
        untrained: Names of parameters whose optimizer state alone is not loaded.

    Example:
        >>> skip = Skip(("lm_head.*", "scheduler"))
        >>> skip.whole("scheduler"), skip.part("model", "lm_head.weight"), skip.part("model", "wte")
        (True, True, False)
    """

    patterns: tuple[str, ...] = ()
    untrained: frozenset[str] = field(default=frozenset())

    def __bool__(self) -> bool:
        """Return whether it names anything."""
        return bool(self.patterns or self.untrained)

    def whole(self, name: str) -> bool:
        """Return whether an object is left out as a whole."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def part(self, name: str, leaf: str) -> bool:
        """Return whether a tensor of an object, or a parameter of an optimizer, is left out."""
        return any(_matches(pattern, name, leaf) for pattern in self.patterns)


def keep_skipped(
    objects: Mapping[str, object], tree: Mapping[str, Any], skip: Skip
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a tree in which all that `skip` names has the state of the live objects.

    Args:
        objects: The live objects by name.
        tree: What `capture` returned, decoded with `lazy=True`.
        skip: What not to load.

    Returns:
        The tree for `restore`, and the paths that it does not load.

    Raises:
        ConfigError: A pattern fits nothing.
        StateMismatchError: A pattern fits only one of several tied tensors.

    Example:
        >>> import torch
        >>> old, new = torch.nn.Linear(2, 1), torch.nn.Linear(2, 3)
        >>> tree, skipped = keep_skipped({"model": new}, _lazily({"model": old}), Skip(("*",)))
        >>> skipped
        ('model',)
    """
    blender = _Blender(skip)
    live = _lazily(objects)
    own = {name: value for name, value in tree.items() if name not in ("rng", "values")}
    blended = blender.group(own, live, "")
    blender.refuse_idle_patterns([*own, *live])
    rest = {name: tree[name] for name in ("rng", "values") if name in tree}
    return {**blended, **rest}, tuple(blender.skipped)


class _Blender:
    """Walks the stored and the live tree together, and takes what is skipped from the live one."""

    def __init__(self, skip: Skip) -> None:
        self.skipped: list[str] = []
        self._skip = skip
        self._idle = set(skip.patterns)

    def group(self, stored: Mapping[Any, Any], live: Mapping[Any, Any], path: str) -> Any:
        merged = {
            key: self._value(stored.get(key, _MISSING), live.get(key, _MISSING), _join(path, key))
            for key in dict.fromkeys([*stored, *live])
        }
        return {key: value for key, value in merged.items() if value is not _MISSING}

    def refuse_idle_patterns(self, names: Iterable[str]) -> None:
        if self._idle:
            raise ConfigError(
                f"skip={sorted(self._idle)}",
                "fits nothing in the checkpoint or here",
                expected=f"patterns of parameters, or of {sorted(set(names))}",
            )

    def _value(self, stored: Any, live: Any, path: str) -> Any:
        if self._skips(path, None):
            return live
        if type(stored) is dict and type(live) is dict:
            return self.group(stored, live, path)
        if type(stored) in (list, tuple) and type(stored) is type(live):
            merged = self.group(dict(enumerate(stored)), dict(enumerate(live)), path)
            return type(stored)(merged.values())
        if not (isinstance(stored, Captured) and isinstance(live, Captured)):
            return stored
        if stored.kind != live.kind or live.kind not in _PARTS:
            return stored
        names_in, blend = _PARTS[live.kind]
        names = sorted(names_in(stored) | names_in(live))
        chosen = {name for name in names if self._skips(path, name, live.kind)}
        if live.kind == "module":
            _refuse_half_of_a_tie(live, chosen, path)
        return blend(stored, live, chosen)

    def _skips(self, path: str, leaf: str | None, kind: str = "") -> bool:
        used = [p for p in self._skip.patterns if _matches(p, path, leaf)]
        untrained = kind == "optimizer" and leaf in self._skip.untrained
        self._idle -= set(used)
        if used:
            self.skipped.append(path if leaf is None else f"{path}.{leaf}")
        return bool(used) or untrained


def _matches(pattern: str, path: str, leaf: str | None) -> bool:
    if leaf is None:
        return fnmatchcase(path, pattern)
    return fnmatchcase(leaf, pattern) or fnmatchcase(f"{path}.{leaf}", pattern)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _refuse_half_of_a_tie(module: Captured, names: set[str], path: str) -> None:
    """Refuse to load a tied tensor under one of its names and keep it under another."""
    leaves = {name: tensor.path for name, tensor in module.state.items()}
    kept = {leaves[name] for name in names if name in leaves}
    tied = sorted(name for name, leaf in leaves.items() if leaf in kept and name not in names)
    if tied:
        raise StateMismatchError(
            f"{path}: {', '.join(tied)}",
            "is tied to a tensor that skip names",
            hint="let skip name all tensors that are tied, or none of them",
        )


def _blend_module(stored: Captured, live: Captured, names: set[str]) -> Captured:
    def blended(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in old.items() if name not in names}
        return {**kept, **{name: value for name, value in new.items() if name in names}}

    buffers = blended(stored.facts.get("buffers", {}), live.facts.get("buffers", {}))
    facts = {**stored.facts, "buffers": buffers}
    return replace(stored, state=blended(stored.state, live.state), facts=facts)


def _blend_optimizer(stored: Captured, live: Captured, names: set[str]) -> Captured:
    """Return the groups that are here, each with the options of the stored one most like it."""
    if not names:
        return stored
    old, new = stored.state["param_groups"], live.state["param_groups"]
    groups = [_with_options(group, old, names) for group in new]
    kept = {name: value for name, value in stored.state["state"].items() if name not in names}
    own = {name: value for name, value in live.state["state"].items() if name in names}
    return replace(stored, state={"state": {**kept, **own}, "param_groups": groups})


def _with_options(group: Any, old: Iterable[Any], names: set[str]) -> Any:
    not_skipped = set(group["params"]) - names
    same = [one for one in old if not_skipped and not_skipped <= set(one["params"])]
    return {**same[0], "params": group["params"]} if same else group


def _tensors_of(module: Captured) -> set[str]:
    return {*module.state, *module.facts.get("buffers", {})}


def _parameters_of(optimizer: Captured) -> set[str]:
    return {name for group in optimizer.state["param_groups"] for name in group["params"]}


_Names = Callable[[Captured], set[str]]
_Blend = Callable[[Captured, Captured, set[str]], Captured]
_PARTS: dict[str, tuple[_Names, _Blend]] = {
    "module": (_tensors_of, _blend_module),
    "optimizer": (_parameters_of, _blend_optimizer),
}
"""The kinds that can be loaded in part: what their parts are called, and how to mix two states."""


@dataclass(frozen=True)
class _Live:
    """A live tensor as a checkpoint would list it, with the part of it that is here."""

    part: TensorLeaf

    @property
    def dtype(self) -> str:
        return self.part.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.global_shape or self.part.shape

    @property
    def nbytes(self) -> int:
        if self.part.global_shape is None:
            return self.part.nbytes
        return prod(self.part.global_shape) * self.part.tensor.element_size()


@dataclass(frozen=True)
class _Memory:
    """The live tensors as a checkpoint would hold them; nothing is copied."""

    tensors: Mapping[str, _Live]

    @property
    def manifest(self) -> _Memory:
        return self

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        done = 0
        for chunk in self.tensors[path].part.chunks():
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)

    def read_box_into(
        self, path: str, _offsets: tuple[int, ...], _shape: tuple[int, ...], buffer: memoryview, /
    ) -> None:
        self.read_leaf_into(path, buffer)  # the part of this rank is the one that it asks for


def _lazily(objects: Mapping[str, object]) -> dict[str, Any]:
    """Return the state of live objects as a checkpoint of them would be decoded."""
    captured = capture(objects)
    encoded = encode(captured)
    source = _Memory({leaf.path: _Live(leaf) for leaf in encoded.leaves})
    tree: dict[str, Any] = decode(encoded.structure, source, types=types_in(captured), lazy=True)
    return tree
