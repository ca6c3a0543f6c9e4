"""Optimizers by the names of parameters, in exactly the dtypes that they have; and schedulers.

`torch.optim.Optimizer.load_state_dict` is not used to bring state back: it files state by
position, so that parameters in another order get the moments of others, casts fp32 moments of bf16
parameters to bf16, and keeps references to the tensors that it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from unbroken.capture.kinds.modules import named_parameters
from unbroken.capture.state_taken_back import NotTakenBack, give_back
from unbroken.capture.state_tree import (
    Captured,
    Mismatch,
    State,
    TreeMap,
    children,
    is_named,
    is_names,
)
from unbroken.capture.stored_tensor import (
    Blocks,
    Filling,
    StoredSubclass,
    StoredTensor,
    describe,
    home,
    is_stored_tensor,
    load_tensors,
)
from unbroken.capture.tensors import is_sharded, same_cut
from unbroken.errors import CaptureError

# State of an optimizer that can be overwritten where it is: filling it takes no new memory.


class ReusableState:
    """The tensors that an optimizer has as state, before others replace them.

    Memory that is shared, by live tensors or by stored ones, is never overwritten: those that
    share it would no longer be what the checkpoint says.

    Args:
        optimizer: Live, with its state.
        stored: The state that it is going to get.
    """

    def __init__(self, optimizer: Optimizer, stored: Mapping[str, Any]) -> None:
        self._state = dict(optimizer.state)
        self._live: Counter[int] = Counter()
        self._stored: Counter[str] = Counter()
        if not self._state:
            return
        live = [*self._state.values(), *(group["params"] for group in optimizer.param_groups)]
        held = (_held(one) for one in _values_in(live))
        self._live.update(_memory_of(one) for one in held if _has_memory(one))
        leaves = (value for value in _values_in(stored) if isinstance(value, StoredTensor))
        self._stored.update(leaf.path for leaf in leaves)

    def place_for(
        self, value: StoredTensor, parameter: torch.Tensor, key: object
    ) -> torch.Tensor | None:
        """Return the live tensor that may be overwritten with `value`; None: there is none."""
        state = self._state.get(parameter)
        live = state.get(key) if isinstance(state, dict) else None
        held = _held(live)
        if live is None or type(held) is not torch.Tensor or not _has_memory(held):
            return None
        if is_sharded(live) and not same_cut(live, parameter):
            return None
        alone = self._live[_memory_of(held)] == 1 and self._stored[value.path] == 1
        return live if alone and live.device == parameter.device and value.is_like(live) else None


def _values_in(tree: object) -> Iterator[Any]:
    """Yield every value as often as it occurs."""
    todo = [tree]
    while todo:
        value = todo.pop()
        yield value
        todo.extend(children(value))


def _held(value: object) -> Any:
    """Return the tensor that a value is on this rank."""
    if not is_sharded(value):
        return value
    with torch.no_grad():
        return value.to_local()


def _has_memory(value: object) -> bool:
    plain = type(value) in (torch.Tensor, nn.Parameter)
    return plain and value.layout == torch.strided  # type: ignore[attr-defined]


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# Names of parameters: what optimizers' state is filed under, instead of positions.


class ParameterNames:
    """The names of all parameters in the registered objects.

    Those of the object called "model" have their bare names; those of others begin with the
    object's name ("critic.layer.weight"); a tensor that is registered itself has its own name.

    Args:
        objects: The registered objects by name.

    Example:
        >>> objects = {"model": nn.Linear(2, 1), "temperature": nn.Parameter(torch.ones(()))}
        >>> names = ParameterNames(objects)
        >>> names.of(objects["model"].bias), names.of(objects["temperature"])
        ('bias', 'temperature')
    """

    def __init__(self, objects: Mapping[str, object]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        for path in sorted(objects, key=lambda path: path != "model"):
            for name, tensor in _named_tensors(objects[path], path):
                self._add(name, tensor)

    def of(self, tensor: torch.Tensor) -> str | None:
        """Return the first name of a parameter; None if no registered object holds it."""
        return self._names.get(id(tensor))

    def find(self, name: str) -> torch.Tensor | None:
        """Return the parameter that has this name, be it its first or another one."""
        return self._tensors.get(name)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if self._tensors.setdefault(name, tensor) is not tensor:
            raise CaptureError(
                name, "two parameters have this name", hint="register the object under another name"
            )
        self._names.setdefault(id(tensor), name)


def _named_tensors(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, nn.Module):
        for name, parameter in named_parameters(value):
            yield (name if path == "model" else f"{path}.{name}"), parameter
    elif isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _named_tensors(item, f"{path}.{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named_tensors(item, f"{path}.{key}")


_OWN_KEYS = ("params", "param_names")


def capture_optimizer(optimizer: Optimizer, path: str, names: ParameterNames) -> State:
    """Return an optimizer's state and groups by the names of its parameters."""
    groups = [
        {"params": _group_names(group, f"{path}.param_groups.{index}", names), **_options(group)}
        for index, group in enumerate(optimizer.param_groups)
    ]
    by_name = {
        name: parameter
        for stored, group in zip(groups, optimizer.param_groups, strict=True)
        for name, parameter in zip(stored["params"], group["params"], strict=True)
    }
    by_name |= _trained_before(optimizer, names)
    state = {name: optimizer.state[p] for name, p in by_name.items() if p in optimizer.state}
    for name, own in state.items():
        _check_cut(by_name[name], own, f"{path}.state.{name}")
    devices = {name: str(p.device) for name, p in by_name.items() if p.device.type != "cpu"}
    facts = {
        "devices": devices,
        "shared": _shared_state(optimizer, by_name, path),
        "more": _more_state(optimizer),
    }
    return {"state": state, "param_groups": groups}, facts


def _trained_before(optimizer: Optimizer, names: ParameterNames) -> dict[str, Any]:
    """Return the parameters that were taken out of the groups, and whose state is kept."""
    keys: list[Any] = [*optimizer.state]
    named = [(names.of(one), one) for one in keys if isinstance(one, torch.Tensor)]
    return {name: one for name, one in named if name is not None}


def _check_cut(parameter: torch.Tensor, state: Any, path: str) -> None:
    """Refuse state of a sharded parameter that other ranks could not shard again."""
    if not is_sharded(parameter) or not isinstance(state, dict):
        return
    for key, value in state.items():
        is_own = isinstance(value, torch.Tensor) and (is_sharded(value) or value.dim() > 0)
        if is_own and not same_cut(parameter, value):
            raise CaptureError(
                f"{path}.{key}",
                "is not sharded as its parameter is",
                expected=describe(parameter),
                found=describe(value),
                hint="keep state of the parameter's shape, or plain numbers",
            )


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _OWN_KEYS}


def _group_names(group: dict[str, Any], path: str, names: ParameterNames) -> list[str]:
    found = []
    for index, parameter in enumerate(group["params"]):
        name = names.of(parameter)
        if name is None:
            raise CaptureError(
                f"{path}.params.{index}",
                "the optimizer trains a parameter that no registered object holds",
                found=describe(parameter),
                hint="register the module that holds it, or the parameter itself under a name",
            )
        found.append(name)
    return found


def _shared_state(optimizer: Optimizer, by_name: dict[str, Any], path: str) -> dict[Any, Any]:
    """Return what an optimizer keeps for all parameters together, under keys of its own."""
    known = {id(parameter) for parameter in by_name.values()}
    shared = {key: value for key, value in optimizer.state.items() if id(key) not in known}
    for key in shared:
        if isinstance(key, torch.Tensor):
            raise CaptureError(
                f"{path}.state",
                "holds state of a parameter that is in none of its groups",
                found=describe(key),
                hint="delete that entry of optimizer.state, or add the parameter to a group",
            )
    return shared


def _more_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer with a `state_dict` of its own puts there besides the usual."""
    if type(optimizer).state_dict is Optimizer.state_dict:
        return {}
    saved = optimizer.state_dict()
    return {key: value for key, value in saved.items() if key not in ("state", "param_groups")}


def check_optimizer(
    optimizer: Optimizer, stored: Captured, path: str, names: ParameterNames
) -> Iterator[Mismatch]:
    """Yield all that keeps the stored state from fitting the optimizer."""
    live = [_live_names(group, names) for group in optimizer.param_groups]
    saved = [_saved_names(group, names) for group in stored.state["param_groups"]]
    here, there = set().union(*live), set().union(*saved)
    for name in sorted(here - there):
        yield Mismatch(f"{path}.{name}", "the checkpoint's optimizer did not train this parameter")
    for name in sorted(there - here):
        yield Mismatch(f"{path}.{name}", "the optimizer here does not train this parameter")
    for name in sorted(here & there):
        yield from _check_state(names.find(name), stored.state["state"].get(name), path, name)
    if here == there and sorted(map(sorted, live)) != sorted(map(sorted, saved)):
        sizes = [[len(group) for group in groups] for groups in (saved, live)]
        yield Mismatch(f"{path}.param_groups", "parameters are grouped otherwise", *sizes)


def _check_state(
    parameter: torch.Tensor | None, state: Any, path: str, name: str
) -> Iterator[Mismatch]:
    """Yield what of a stored state cannot be put together here, or sharded as the parameter is."""
    if isinstance(state, dict):
        unknown = (one for one in state.values() if isinstance(one, StoredSubclass))
        for value in unknown:
            if value.kind is None:
                what = f"is a {value.type_name}, a class that the optimizer here does not use"
                yield Mismatch(value.path, what)
    if not is_sharded(parameter) or not isinstance(state, dict):
        return
    for key, value in state.items():
        if isinstance(value, StoredTensor) and value.shape not in ((), tuple(parameter.shape)):
            where = f"{path}.state.{name}.{key}"
            yield Mismatch(where, "cannot be sharded as its parameter", found=value)


def _live_names(group: dict[str, Any], names: ParameterNames) -> set[str]:
    found = (names.of(parameter) for parameter in group["params"])
    return {
        name or f"(unregistered {describe(parameter)})"
        for name, parameter in zip(found, group["params"], strict=True)
    }


def _saved_names(group: dict[str, Any], names: ParameterNames) -> set[str]:
    """Return a stored group's names; a parameter with several goes by its first name here."""
    return {_name_here(name, names) for name in group["params"]}


def _name_here(name: str, names: ParameterNames) -> str:
    parameter = names.find(name)
    return name if parameter is None else names.of(parameter) or name


def is_optimizer_state(state: Any, facts: Mapping[str, Any]) -> bool:
    """Return whether a decoded state is what `capture_optimizer` gives."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    more = (facts.get(name, {}) for name in ("devices", "shared", "more"))
    return (
        isinstance(groups, list)
        and all(is_named(group) and is_names(group.get("params")) for group in groups)
        and is_named(state.get("state"))
        and all(isinstance(one, dict) for one in more)
    )


def restore_optimizer(
    optimizer: Optimizer, stored: Captured, names: ParameterNames, later: Filling
) -> list[NotTakenBack]:
    """Bring state and groups back, to whatever positions the parameters have now."""
    lost = _give_back_more(optimizer, stored.facts.get("more"))
    blocks: Blocks = {}
    saved_groups = list(stored.state["param_groups"])
    kept = ReusableState(optimizer, stored.state["state"])
    optimizer.state.clear()
    for group in optimizer.param_groups:
        saved = _take_group(saved_groups, _live_names(group, names), names)
        _restore_options(group, saved)
        by_name = {_name_here(name, names): name for name in saved["params"]}
        _put_in_order(group["params"], list(by_name), names)
        for parameter in group["params"]:
            name = by_name[names.of(parameter) or ""]
            if name in stored.state["state"]:
                was = stored.facts.get("devices", {}).get(name, "cpu")
                loader = _StateLoader(parameter, was, _step_on_device(group), blocks, later, kept)
                optimizer.state[parameter] = loader(stored.state["state"][name])
    for name, state in stored.state["state"].items():
        one = names.find(name)
        if one is not None and one not in optimizer.state:  # no longer trained
            was = stored.facts.get("devices", {}).get(name, "cpu")
            optimizer.state[one] = _StateLoader(one, was, False, blocks, later, kept)(state)
    optimizer.state.update(load_tensors(stored.facts.get("shared", {})))
    return lost


def _give_back_more(optimizer: Optimizer, more: Any) -> list[NotTakenBack]:
    """Give an optimizer what it saves besides its state and its groups."""
    if not more:
        return []

    def give(given: Any) -> None:
        optimizer.load_state_dict({**optimizer.state_dict(), **given})

    def ask() -> Any:
        state = optimizer.state_dict()
        return {name: state[name] for name in more if name in state}

    return give_back(optimizer, load_tensors(more), give, ask)


def _put_in_order(parameters: list[Any], stored: list[str], names: ParameterNames) -> None:
    """Bring parameters into their stored order: norms of gradients are summed in it."""
    position = {name: number for number, name in enumerate(stored)}
    parameters.sort(key=lambda parameter: position[names.of(parameter) or ""])


def _take_group(saved: list[Any], live: set[str], names: ParameterNames) -> dict[str, Any]:
    """Take out the stored group of these parameters, wherever it stood."""
    position = next(i for i, group in enumerate(saved) if _saved_names(group, names) == live)
    group: dict[str, Any] = saved.pop(position)
    return group


def _step_on_device(group: dict[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))


def _restore_options(group: dict[str, Any], saved: dict[str, Any]) -> None:
    """Set a group's options; tensors (such as the learning rate) are filled in place."""
    for key, value in _options(saved).items():
        live = group.get(key)
        if (
            isinstance(value, StoredTensor)
            and isinstance(live, torch.Tensor)
            and _fits(live, value)
        ):
            value.copy_into(live)
        else:
            group[key] = load_tensors(value)


def _fits(live: torch.Tensor, stored: StoredTensor) -> bool:
    return (live.dtype, tuple(live.shape)) == (stored.dtype, stored.shape)


class _StateLoader:
    """Loads the state of one parameter to where the optimizer expects it.

    Tensors that were on the parameter's device go to its device now; step counters as torch has
    them: on the device for capturable and fused optimizers, on the CPU otherwise.
    """

    def __init__(
        self,
        parameter: torch.Tensor,
        was: str,
        step_on_device: bool,
        blocks: Blocks,
        later: Filling,
        kept: ReusableState,
    ) -> None:
        self._kept = kept
        self._parameter = parameter
        self._was = was
        self._step_on_device = step_on_device
        self._blocks = blocks
        self._later = later

    def __call__(self, state: Any) -> Any:
        if not isinstance(state, dict):
            return TreeMap(self._load)(state)
        return {key: self._load_entry(key, value) for key, value in state.items()}

    def _load_entry(self, key: Any, value: Any) -> Any:
        if key == "step":
            return self._load_step(value)
        at_home = isinstance(value, StoredTensor) and value.device == self._was
        live = self._kept.place_for(value, self._parameter, key) if at_home else None
        if live is None:
            return TreeMap(self._load)(value)
        value.copy_into(live, self._later)
        return live

    def _load(self, value: Any) -> Any:
        if isinstance(value, StoredSubclass):
            same = value.device == self._was
            return value.load(self._parameter.device if same else home(value), self._blocks)
        if not isinstance(value, StoredTensor):
            return value
        if is_sharded(self._parameter) and value.shape == tuple(self._parameter.shape):
            return value.load_like(self._parameter, self._later)
        same = value.device == self._was
        device = self._parameter.device if same else home(value)
        return value.load(device, self._blocks, self._later)

    def _load_step(self, value: Any) -> Any:
        if not isinstance(value, StoredTensor):
            return value
        device = self._parameter.device if self._step_on_device else torch.device("cpu")
        return value.load(device, self._blocks, self._later)


# Learning-rate schedulers and the loss scaler of mixed precision.


def capture_scheduler(scheduler: LRScheduler, _path: str, _names: object) -> State:
    """Return a scheduler's state and the learning rates that it has set."""
    facts = {"lr": [group["lr"] for group in _groups(scheduler)]}
    return scheduler.state_dict(), facts


def _groups(scheduler: LRScheduler) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = scheduler.optimizer.param_groups
    return groups


def check_scheduler(
    scheduler: LRScheduler, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """Yield all that keeps the stored state from fitting the scheduler."""
    here, there = len(_groups(scheduler)), len(stored.facts["lr"])
    if here != there:
        yield Mismatch(path, "schedules another number of parameter groups", there, here)


def is_scheduler_state(state: Any, facts: Mapping[str, Any]) -> bool:
    """Return whether a decoded state is what `capture_scheduler` gives."""
    rates = facts.get("lr")
    return is_named(state) and isinstance(rates, list) and all(map(_is_number, rates))


def _is_number(value: Any) -> bool:
    is_stored = is_stored_tensor(value) and tuple(value.shape) in ((), (1,))
    return is_stored or (type(value) in (int, float) and abs(value) < 2**63) or value != value


def restore_scheduler(scheduler: LRScheduler, stored: Captured, *_: object) -> list[NotTakenBack]:
    """Bring back a scheduler and its learning rates, which its state alone does not set."""
    state = load_tensors(stored.state)
    lost = give_back(scheduler, state, scheduler.load_state_dict, scheduler.state_dict)
    for group, lr in zip(_groups(scheduler), load_tensors(stored.facts["lr"]), strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lost


def capture_scaler(scaler: GradScaler, _path: str, _names: object) -> State:
    """Return a loss scaler's state; empty if it is switched off."""
    return scaler.state_dict(), {}


def check_scaler(
    scaler: GradScaler, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """Yield a mismatch if the scaler is on here and off in the checkpoint, or vice versa."""
    was, is_now = (("on" if on else "off") for on in (bool(stored.state), scaler.is_enabled()))
    if was != is_now:
        yield Mismatch(path, "loss scaling is switched otherwise", was, is_now)


def restore_scaler(scaler: GradScaler, stored: Captured, *_: object) -> None:
    """Bring back scale and growth counter, whether the scaler has been used already or not."""
    scaler.load_state_dict(load_tensors(stored.state))


_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def is_scaler_state(state: Any, _facts: Mapping[str, Any]) -> bool:
    """Return whether a decoded state is what `capture_scaler` gives."""
    return is_named(state) and (
        not state or (_SCALER.issubset(state) and all(map(_is_number, state.values())))
    )
