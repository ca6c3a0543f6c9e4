"""What a forward and backward pass computed: a digest of each output and each gradient."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from unbroken.capture import unwrapped
from unbroken.distributed.dtensors import is_dtensor
from unbroken.recorder.digests import TensorDigester, generator_digests

_WHOLE = TensorDigester(sampled=False)
_MOST_DEEP = 4

OUTPUT = "output"
LOSS = "loss"
GRADIENT_OF_OUTPUT = "gradient of the output"
GRADIENT = "gradient"
SUMMED_GRADIENT = "gradient, as the optimizer gets it,"
BUFFER = "buffer"
GENERATOR = "generator"


class Entry(NamedTuple):
    """One thing that a pass computed.

    Attributes:
        kind: One of the words above.
        name: Of the module, the parameter, the buffer or the generator.
        number: How often this pass had come there before.
    """

    kind: str
    name: str
    number: int

    def __str__(self) -> str:
        again = f", at its {self.number + 1}. time in this step" if self.number else ""
        if self.kind == LOSS:
            return f"{LOSS}{again}"
        if self.kind in (BUFFER, GENERATOR):
            return f"{self.kind} {self.name}{again}"
        return f"{self.kind} of {self.name}{again}"


class PassRecord:
    """The digests of all that one pass computed, in the order in which it was there."""

    def __init__(self) -> None:
        self._digests: dict[Entry, bytes] = {}
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, kind: str, name: str, value: Any) -> None:
        """Add what is to be compared: tensors, alone or in what holds them."""
        digest = value if isinstance(value, bytes) else _digest(value)
        if digest is not None:
            number = self._counts[kind, name]
            self._counts[kind, name] += 1
            self._digests[Entry(kind, name, number)] = digest

    def differences(self, other: PassRecord) -> list[Entry]:
        """Return in which entries two passes differ, the first in the order of this one first."""
        mine, others = self._digests, other._digests
        differing = [entry for entry, digest in mine.items() if others.get(entry) != digest]
        return [*differing, *(entry for entry in others if entry not in mine)]

    def position(self, entry: Entry) -> int:
        """Return how many entries come before one; ranks that compute alike have them alike."""
        return [*self._digests, entry].index(entry)

    def add_results(self, parameters: Mapping[str, Tensor], model: nn.Module) -> None:
        """Add what a pass leaves: gradients, buffers, and where generators stand."""
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                self.add(SUMMED_GRADIENT, name, parameter.grad)
        for name, buffer in unwrapped(model).named_buffers():
            self.add(BUFFER, name, buffer)
        for name, digest in generator_digests().items():
            self.add(GENERATOR, name, digest.encode())


@contextmanager
def recording(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[PassRecord]:
    """Record what passes through a model compute, by hooks that are taken away on leaving.

    No result depends on these hooks: none returns anything, and modules whose kernels depend on
    whether there are hooks, or that are compiled, have none inside.

    Args:
        model: As it is called.
        parameters: By name.
    """
    record = PassRecord()
    handles: list[RemovableHandle] = []
    try:
        for name, module in observed_modules(model):
            label = f"{name or 'the model'} ({_kind(module)})"
            handles.append(module.register_forward_hook(partial(_on_output, record, label)))
        for name, parameter in parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                handles.append(parameter.register_hook(_watcher(record, GRADIENT, name)))  # type: ignore[no-untyped-call]
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _on_output(record: PassRecord, label: str, _module: nn.Module, _args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    record.add(OUTPUT, label, output)
    for tensor in _tensors(output, 0):
        if tensor.requires_grad and tensor.grad_fn is not None:
            tensor.register_hook(_watcher(record, GRADIENT_OF_OUTPUT, label))  # type: ignore[no-untyped-call]


def _watcher(record: PassRecord, kind: str, name: str) -> Callable[[Tensor], None]:
    def on_gradient(gradient: Tensor) -> None:
        if not torch.compiler.is_compiling():
            record.add(kind, name, gradient)

    return on_gradient


def observed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose outputs may be looked at, by their names in the bare model."""
    todo, seen = [("", model)], set[int]()
    while todo:
        name, module = todo.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, DistributedDataParallel):
            todo.append((name, module.module))
            continue
        if not _is_sealed(module):
            yield name, module
        if not _is_closed(module):
            children = [(f"{name}.{n}" if name else n, one) for n, one in module.named_children()]
            todo += reversed(children)


_BY_HOOKS = (nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.MultiheadAttention)
"""Where these evaluate, they have a faster kernel, with other bits, for modules without hooks."""


def _is_sealed(module: nn.Module) -> bool:
    """Return whether a hook on a module itself could change what it computes, or is impossible."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if isinstance(module, _BY_HOOKS) and not module.training:
        return True
    return _is_compiled(module) and not _is_wrapper(module)


def _is_closed(module: nn.Module) -> bool:
    """Return whether nothing inside of a module is looked at."""
    return _is_sealed(module) or _is_wrapper(module) or isinstance(module, nn.DataParallel)


def _is_wrapper(module: nn.Module) -> bool:
    """Return whether a module is the compiled form of another: its own hooks run outside of it."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def _is_compiled(module: nn.Module) -> bool:
    if module._compiled_call_impl is not None:  # noqa: SLF001 (what Module.compile() sets)
        return True
    own = vars(module).get("forward", type(module).forward)
    return hasattr(own, "_torchdynamo_orig_callable")


def _kind(module: nn.Module) -> str:
    return type(module).__name__


# From what a module returns to a digest.


def _digest(value: Any) -> bytes | None:
    tensors = [*_tensors(value, 0)]
    if not tensors:
        return None
    return b"".join(_WHOLE.of(one) + f"{one.dtype}{tuple(one.shape)}".encode() for one in tensors)


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    """Yield the tensors in an output that have memory which can be read."""
    if isinstance(value, Tensor):
        if _is_readable(value):
            yield value
    elif depth < _MOST_DEEP:
        for part in _parts(value):
            yield from _tensors(part, depth + 1)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        return iter(value.values())
    if isinstance(value, list | tuple):
        return iter(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return iter(vars(value).values()) if hasattr(value, "__dict__") else iter(())
    return iter(())


def _is_readable(tensor: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 (no public name)
        return False
    plain = type(tensor) in (Tensor, nn.Parameter) or is_dtensor(tensor)
    return plain and not tensor.is_meta and tensor.layout in (torch.strided, torch.sparse_coo)
