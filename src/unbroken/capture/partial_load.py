"""Load a checkpoint in part: what `skip` names keeps its live state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from unbroken.capture.codec.leaves import TensorLeaf
from unbroken.capture.codec.values import decode, encode
from unbroken.capture.objects import capture
from unbroken.capture.state_tree import Captured, types_in
from unbroken.errors import ConfigError, StateMismatchError

_GONE = object()


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
        return any(_fits(pattern, name, leaf) for pattern in self.patterns)


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
            key: self._value(stored.get(key, _GONE), live.get(key, _GONE), _join(path, key))
            for key in dict.fromkeys([*stored, *live])
        }
        return {key: value for key, value in merged.items() if value is not _GONE}

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
        used = [p for p in self._skip.patterns if _fits(p, path, leaf)]
        untrained = kind == "optimizer" and leaf in self._skip.untrained
        self._idle -= set(used)
        if used:
            self.skipped.append(path if leaf is None else f"{path}.{leaf}")
        return bool(used) or untrained


def _fits(pattern: str, path: str, leaf: str | None) -> bool:
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
