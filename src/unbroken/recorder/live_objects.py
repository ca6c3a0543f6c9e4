"""Find what takes part in training besides the optimizer, without help from the script.

The garbage collector knows every live object: modules (their buffers, and parameters that no
optimizer moves, such as an averaged copy), gradient scalers, schedulers, and dicts or lists of
tensors shaped as the parameters (a hand-written average). Only types are looked at; no attribute
of an unknown object is touched.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .digests import GroupDigest, TensorDigester, parameters_of

_CLASSES = (nn.Module, Optimizer, GradScaler, LRScheduler)
_COLLECTIONS = (dict, OrderedDict, list)
_SAMPLED_FROM = 1 << 26  # bytes of weights outside the optimizer from which samples are read
_REFERENCES_OF_OURS = 3  # the list that holds it, the loop variable, the argument of getrefcount


class LiveObjects:
    """The live objects of training, as found at one moment; modules are held weakly."""

    def __init__(self) -> None:
        found = _live_objects()
        optimizers = [one for one in found if isinstance(one, Optimizer)]
        self._trained = {id(parameter) for one in optimizers for parameter in parameters_of(one)}
        modules = _roots([one for one in found if isinstance(one, nn.Module)])
        self._modules = [weakref.ref(module) for module in modules]
        self._moving = [weakref.ref(one) for one in modules if any(self._moves(one))]
        self._idle = [weakref.ref(one) for one in modules if not all(self._moves(one))]
        self._scalers = [weakref.ref(one) for one in found if isinstance(one, GradScaler)]
        self._schedulers = [weakref.ref(one) for one in found if isinstance(one, LRScheduler)]
        self._mirrors = _mirrors(found, self._known_memory(optimizers), _shapes(optimizers))

    def names(self, optimizer: Optimizer) -> list[str]:
        """Return the name of each parameter of an optimizer in its module, "" for unknown ones."""
        names: dict[int, str] = {}
        for module in self._live(self._modules):
            for name, parameter in module.named_parameters():
                names.setdefault(id(parameter), name)
        return [names.get(id(parameter), "") for parameter in parameters_of(optimizer)]

    def buffer_names(self) -> list[str]:
        """Return the names of the buffers, in the order of their digests."""
        return [name for name, _ in self._buffers()]

    def buffers(self, digester: TensorDigester) -> GroupDigest:
        """Return the digest of the buffers of all modules that have trained parameters."""
        return digester.of_all(buffer for _, buffer in self._buffers())

    def modes(self) -> str:
        """Return for each module with trained parameters, and each in it, whether it trains."""
        modules = (one for root in self._live(self._moving) for one in root.modules())
        return "".join(str(int(one.training)) for one in modules)

    def scalers(self) -> list[list[float]]:
        """Return scale and growth count of each gradient scaler in use."""
        live = [one for one in self._live(self._scalers) if one.is_enabled()]
        return sorted([one.get_scale(), float(one._get_growth_tracker())] for one in live)  # noqa: SLF001

    def schedulers(self) -> list[list[Any]]:
        """Return class and step of each learning rate scheduler."""
        return sorted([type(one).__name__, one.last_epoch] for one in self._live(self._schedulers))

    def others(self, digester: TensorDigester) -> list[list[str]]:
        """Return label and digest of all that no optimizer moves and that looks like weights."""
        found = [self._other(module, digester) for module in self._live(self._idle)]
        self._mirrors = [one for one in self._mirrors if sys.getrefcount(one) > _REFERENCES_OF_OURS]
        for mirror in self._mirrors:
            tensors = _tensors(mirror)
            label = f"{type(mirror).__name__} of {len(tensors)} tensors shaped as the parameters"
            found.append([label, _digest_of_idle(tensors, digester)])
        return sorted(found)

    def _moves(self, module: nn.Module) -> list[bool]:
        """Return for each parameter of a module whether an optimizer moves it."""
        return [id(parameter) in self._trained for parameter in module.parameters()]

    def _other(self, module: nn.Module, digester: TensorDigester) -> list[str]:
        """Return an untrained module, or the parameters in a trained one that are not trained."""
        parameters = list(module.parameters())
        idle = [parameter for parameter in parameters if id(parameter) not in self._trained]
        where = f"{type(module).__name__} ({len(idle)} parameters outside the optimizer)"
        buffers = module.buffers() if len(idle) == len(parameters) else ()
        return [where, _digest_of_idle([*idle, *buffers], digester)]

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for module in self._live(self._moving):
            yield from module.named_buffers()

    def _known_memory(self, optimizers: list[Optimizer]) -> set[int]:
        """Return the addresses of all tensors that are seen elsewhere."""
        known = {
            tensor.data_ptr()
            for module in self._live(self._modules)
            for tensor in (*module.parameters(), *module.buffers())
            if _has_memory(tensor)
        }
        for optimizer in optimizers:
            for parameter in parameters_of(optimizer):
                state = optimizer.state.get(parameter, {})
                tensors = [parameter, parameter.grad, *state.values()]
                known |= {one.data_ptr() for one in tensors if _has_memory(one)}
        return known

    @staticmethod
    def _live(references: Iterable[weakref.ref[Any]]) -> list[Any]:
        return [one for reference in references if (one := reference()) is not None]


def _digest_of_idle(tensors: list[Tensor], digester: TensorDigester) -> str:
    """Return a digest of weights that nothing trains; frozen ones can be most of a model."""
    is_large = sum(tensor.nbytes for tensor in tensors) > _SAMPLED_FROM
    return (TensorDigester(sampled=True) if is_large else digester).of_all(tensors).whole


def _live_objects() -> list[Any]:
    """Return the live objects of the classes that matter; there may be a million of others."""
    matters: dict[type, bool] = {}
    found = []
    for one in gc.get_objects():
        kind = type(one)
        if kind not in matters:
            matters[kind] = issubclass(kind, _CLASSES) or kind in _COLLECTIONS
        if matters[kind]:
            found.append(one)
    return found


def _roots(modules: list[nn.Module]) -> list[nn.Module]:
    """Return the modules that are in no other one, in an order that does not depend on memory."""
    inner = {id(child) for module in modules for child in module._modules.values()}  # noqa: SLF001
    roots = [
        module
        for module in modules
        if id(module) not in inner and any(True for _ in module.parameters())
    ]
    return sorted(roots, key=lambda module: (type(module).__qualname__, _shape_text(module)))


def _shape_text(module: nn.Module) -> str:
    return str([tuple(parameter.shape) for parameter in module.parameters()])


def _shapes(optimizers: list[Optimizer]) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for optimizer in optimizers for one in parameters_of(optimizer)]


def _mirrors(found: list[Any], known: set[int], shapes: list[tuple[int, ...]]) -> list[Any]:
    """Return dicts and lists whose tensors have the shapes of the parameters, and own memory."""
    return [one for one in found if type(one) in _COLLECTIONS and _is_mirror(one, known, shapes)]


def _is_mirror(value: Any, known: set[int], shapes: list[tuple[int, ...]]) -> bool:
    if len(value) < max(2, len(shapes)) or len(value) > 2 * len(shapes):
        return False
    tensors = [one for one in _tensors(value) if _has_memory(one) and one.grad_fn is None]
    if len(tensors) < len(value) or any(one.data_ptr() in known for one in tensors):
        return False
    have = [tuple(one.shape) for one in tensors]
    return all(have.count(shape) >= shapes.count(shape) for shape in set(shapes))


def _tensors(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value)


def _has_memory(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
