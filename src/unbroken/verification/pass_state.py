"""What a forward and backward pass changes, as it was before, so that the pass can be run again."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from unbroken.capture import capture_rng, raw, restore_rng, unwrapped
from unbroken.capture.tensors import settle
from unbroken.checkpoint.coverage.attribute_values import look_at
from unbroken.checkpoint.coverage.owners import Known, Owner, owners_in
from unbroken.distributed.dtensors import local_part
from unbroken.verification.resting import counts_of_writes

PutBack = Callable[[], object]

_MOST_BYTES = 256 << 20
_MOST_PARTS = 100_000
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)


class PassState:
    """Buffers, gradients, generators and attributes, as they are before a pass.

    Parameters are not copied, but those in `written`: where a pass writes others, it cannot be
    run again from the same state, and `obstacles` says so.

    Args:
        model: As it is called.
        parameters: All of the model and of the optimizer, by name.
        optimizer: No pass is to move it.
        objects: Further objects that a pass may change: the loss, callbacks, a trainer.
        written: Names of parameters that passes write: they are copied.
        known: The code that objects run, kept from one step to the next.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        objects: Mapping[str, object],
        written: Collection[str],
        known: Known,
    ) -> None:
        self._model = unwrapped(model)
        settle({"model": self._model})
        owners = [*owners_in([("model", self._model), *objects.items()], known)]
        kept = _Kept()
        kept.keep_optimizer(optimizer)
        self._parameters = {**parameters, **_parameters_of(owners, parameters)}
        kept.keep_parameters(self._parameters, written)
        for module in (*self._model.modules(), *_modules_of(owners)):
            kept.keep_module(module)
        for owner in owners:
            if not isinstance(owner.thing, nn.Module | Dataset):
                kept.keep_owner(owner)
        self._kept = kept
        self._written = frozenset(written)
        self._identities = self._parameters_now()
        self._writes = counts_of_writes(self._parameters)
        self._generators = capture_rng()

    def put_back(self) -> None:
        """Bring everything back to what it was, in the same objects."""
        settle({"model": self._model})
        self._kept.put_back()
        restore_rng(self._generators)

    def newly_written(self) -> set[str]:
        """Return the names of parameters that were written and not copied."""
        now = counts_of_writes(self._parameters)
        return {n for n, at in now.items() if at != self._writes.get(n)} - self._written

    def obstacles(self) -> list[str]:
        """Return, after a pass, what stands against putting back all that it changed."""
        settle({"model": self._model})
        found = [f"it writes {name}" for name in sorted(self.newly_written())]
        if self._parameters_now() != self._identities:
            found.append("it makes or exchanges parameters")
        return [*found, *self._kept.obstacles()]

    @property
    def moved_optimizer(self) -> str | None:
        """The optimizer or schedule that the pass has moved, if it has moved one."""
        return self._kept.moved_optimizer()

    def _parameters_now(self) -> dict[str, int]:
        return {name: id(p) for name, p in self._model.named_parameters(remove_duplicate=False)}


def has_lazy_parts(model: nn.Module) -> bool:
    """Return whether parameters or buffers get their shapes in the first forward pass."""
    return any(is_lazy(one) for one in (*model.parameters(), *model.buffers()))


def _modules_of(owners: list[Owner]) -> Iterator[nn.Module]:
    return (owner.thing for owner in owners if isinstance(owner.thing, nn.Module))


def _parameters_of(owners: list[Owner], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of modules that are none of the model's, such as a teacher's."""
    seen = {id(parameter) for parameter in known.values()}
    return {
        f"{owner.path}.{name}": parameter
        for owner in owners
        if isinstance(owner.thing, nn.Module)
        for name, parameter in owner.thing.named_parameters(recurse=False)
        if id(parameter) not in seen
    }


class _Kept:
    """Values as they were, and how each comes back."""

    def __init__(self) -> None:
        self._put_back: list[PutBack] = []
        self._alive: dict[int, Any] = {}  # so that no id is given to another object
        self._iterators: list[tuple[Any, Any]] = []
        self._large: dict[str, Tensor] = {}
        self._large_writes: dict[str, tuple[int, int]] = {}
        self._room, self._parts_left = _MOST_BYTES, _MOST_PARTS
        self._optimizers: list[tuple[str, Any, Any]] = []

    def put_back(self) -> None:
        for one in self._put_back:
            one()

    def obstacles(self) -> list[str]:
        moved = [one for one, mark in self._iterators if look_at("", one, {}).mark != mark]
        found = [f"it reads on a {type(one).__name__}" for one in moved]
        for name, at in counts_of_writes(self._large).items():
            if at != self._large_writes[name]:
                found.append(f"it writes {name}, and attributes hold too much to be copied")
        return found

    def moved_optimizer(self) -> str | None:
        for name, one, before in self._optimizers:
            if _position_of(one) != before:
                return name
        return None

    # What follows takes note of one object each.

    def keep_optimizer(self, optimizer: Any) -> None:
        self._is_new(optimizer)
        self._optimizers.append((type(optimizer).__name__, optimizer, _position_of(optimizer)))

    def keep_parameters(self, parameters: Mapping[str, Tensor], written: Collection[str]) -> None:
        for name, parameter in parameters.items():
            if self._is_new(parameter):
                self._keep_gradient(parameter)
            if name in written:
                self._put_back.append(_contents(parameter))

    def keep_module(self, module: nn.Module) -> None:
        if not self._is_new(module):
            return
        own = vars(module)
        held = {n: v for n, v in own.items() if n not in _OF_EVERY_MODULE}
        self._put_back.append(lambda: _put_names(own, held))
        for registry in (own["_buffers"], own["_modules"]):
            self._put_back.append(_items(registry))
        self._put_back.append(_members(own["_non_persistent_buffers_set"]))
        for name, buffer in own["_buffers"].items():
            if buffer is not None and self._is_new(buffer):
                self._keep_tensor(f"buffer {name}", buffer, at_most=None)
        for name, value in held.items():
            self._keep(name, value)

    def keep_owner(self, owner: Owner) -> None:
        held = owner.held()
        self._put_back.append(lambda: _put_attributes(owner, held))
        for name, value in held.items():
            self._keep(f"{owner.path}.{name}", value)

    def _is_new(self, thing: Any) -> bool:
        if id(thing) in self._alive:
            return False
        self._alive[id(thing)] = thing
        return True

    def _keep(self, name: str, value: Any) -> None:
        todo = [value]
        while todo:
            one = todo.pop()
            if self._keep_one(name, one) and len(one) <= self._parts_left:
                self._parts_left -= len(one)
                todo += one.values() if isinstance(one, dict) else one

    def _keep_one(self, name: str, one: Any) -> bool:
        """Keep what a value holds; return whether to go on with its parts."""
        kind = type(one)
        if kind in _ATOMS or not self._is_new(one):
            return False
        if isinstance(one, Tensor):
            self._keep_tensor(name, one, at_most=self._room)
            self._room -= one.nbytes if name not in self._large else 0
        elif isinstance(one, Optimizer | LRScheduler):
            self._optimizers.append((name, one, _position_of(one)))
        elif isinstance(one, Iterator):
            self._iterators.append((one, look_at("", one, {}).mark))
        elif kind in _COPIED:
            self._put_back.append(_COPIED[kind](one))
        return kind in (*_MAPPINGS, list, tuple, deque)

    def _keep_tensor(self, name: str, tensor: Tensor, at_most: int | None) -> None:
        if tensor.grad_fn is not None or tensor.is_meta or tensor.layout is not torch.strided:
            return
        self._keep_gradient(tensor)
        if at_most is None or tensor.nbytes <= at_most:
            self._put_back.append(_contents(tensor))
        else:
            self._large[name] = tensor
            self._large_writes |= counts_of_writes({name: tensor})

    def _keep_gradient(self, tensor: Tensor) -> None:
        if not (tensor.requires_grad and tensor.is_leaf):
            return
        gradient = tensor.grad
        fill = None if gradient is None else _contents(gradient)

        def put_back() -> None:
            tensor.grad = gradient
            if fill is not None:
                fill()

        self._put_back.append(put_back)


_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})


def _position_of(one: Any) -> Any:
    """Return what changes when an optimizer or a schedule steps; nothing is read."""
    if isinstance(one, LRScheduler):
        return one.last_epoch
    state = one.state.items()
    tensors = {
        f"{number}.{name}": value
        for number, (_, values) in enumerate(state)
        if isinstance(values, Mapping)
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    return getattr(one, "_opt_called", None), counts_of_writes(tensors)


# How each kind of value comes back.


def _contents(tensor: Tensor) -> PutBack:
    live = local_part(tensor)
    before = live.detach().clone()

    def put_back() -> None:
        with torch.inference_mode(live.is_inference()), torch.no_grad():
            if live.shape != before.shape:
                live.resize_(before.shape)
            elif _has_same_bits(live, before):
                return  # what stands several times in memory (`expand`) could not be written
            live.copy_(before)

    return put_back


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    if one.is_quantized or one.is_conj() or one.is_neg():
        return False
    return torch.equal(raw(one.contiguous()), raw(other.contiguous()))


def _put_names(space: dict[str, Any], held: Mapping[str, Any]) -> None:
    for name in [n for n in space if n not in held and n not in _OF_EVERY_MODULE]:
        del space[name]
    for name, value in held.items():
        if space.get(name, held) is not value:
            space[name] = value


def _put_attributes(owner: Owner, held: Mapping[str, Any]) -> None:
    now = owner.held()
    for name in now.keys() - held.keys():
        owner.forget(name)
    for name, value in held.items():
        if now.get(name, held) is not value:
            owner.bind(name, value)


def _items(live: Any) -> PutBack:
    before = dict(live)

    def put_back() -> None:
        same = live.keys() == before.keys() and all(live[k] is v for k, v in before.items())
        if not same:
            live.clear()
            live.update(before)

    return put_back


def _elements(live: Any) -> PutBack:
    before = [*live]

    def put_back() -> None:
        live.clear()
        live.extend(before)

    return put_back


def _members(live: Any) -> PutBack:
    before = {*live}

    def put_back() -> None:
        live.clear()
        live.update(before)

    return put_back


def _array(live: Any) -> PutBack:
    if not live.flags.writeable or live.nbytes > _MOST_BYTES:
        return _nothing
    return partial(live.__setitem__, ..., live.copy())


def _nothing() -> None:
    pass


def _bits(live: Any) -> PutBack:
    bits = live.bit_generator
    return partial(setattr, bits, "state", bits.state)


_COPIED: Mapping[type, Callable[[Any], PutBack]] = {
    **dict.fromkeys(_MAPPINGS, _items),
    list: _elements,
    deque: _elements,
    set: _members,
    np.ndarray: _array,
    random.Random: lambda live: partial(live.setstate, live.getstate()),
    np.random.Generator: _bits,
    np.random.RandomState: lambda live: partial(live.set_state, live.get_state(legacy=False)),
    torch.Generator: lambda live: partial(live.set_state, live.get_state()),
}
"""How what is no tensor comes back, by its class."""
