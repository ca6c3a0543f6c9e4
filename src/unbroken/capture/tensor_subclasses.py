"""Tensor subclasses: those that several ranks hold together, and those that come apart.

A sharded tensor (`DTensor`) is described in the structure as the whole tensor that it is a part of,
so a checkpoint has the same tensors however many ranks saved it; how they are sharded stands in the
manifest alone. `torch.distributed.tensor` is not imported here: where nobody has imported it,
there are no such tensors.

Others, such as quantized ones of torchao, come apart into plain tensors. PyTorch's protocol for
them is `__tensor_flatten__`, which names the inner tensors and gives the rest of what makes the
tensor, and `__tensor_unflatten__`, which puts it together again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.optim import Optimizer

from unbroken.capture.dtypes import SAFETENSORS_DTYPES
from unbroken.errors import CaptureError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PROTOCOL = ("__tensor_flatten__", "__tensor_unflatten__")


# Sharded tensors.


@dataclass(frozen=True)
class Part:
    """The part of a sharded tensor that this rank holds; it may be empty, or all of it.

    Args:
        tensor: Its elements, in memory of this process.
        offsets: Where it starts in the whole tensor, by dimension.
        global_shape: The shape of the whole tensor.
    """

    tensor: torch.Tensor
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part."""
        return tuple(self.tensor.shape)

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all of the tensor."""
        return self.shape == self.global_shape


def is_sharded(value: object) -> TypeGuard[DTensor]:
    """Return whether a value is a tensor that several ranks hold together."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


Chunks = dict[tuple[Any, ...], Any]
"""Which part of sharded tensors is here, by how they are cut: torch takes 50 us to find it."""


def part_of(value: DTensor, path: str, known: Chunks | None = None) -> Part:
    """Return what this rank holds of a sharded tensor.

    Args:
        value: The tensor.
        path: Its path, for messages.
        known: What is known of others; it is added to.

    Raises:
        CaptureError: It is a sum still to be made, or of a type that cannot be cut.
    """
    if any(placement.is_partial() for placement in value.placements):
        hint = "redistribute() it: what a rank holds of it is no value"
        raise CaptureError(path, "is a sum over ranks that was not made", hint=hint)
    with torch.no_grad():
        local = value.to_local().detach()
    whole = tuple(value.shape)
    if value.device_mesh.get_coordinate() is None:
        return Part(local.new_empty((0,) * len(whole)), (0,) * len(whole), whole)
    known = {} if known is None else known
    cut = (value.device_mesh, value.placements, whole)
    chunk = known.get(cut)
    if chunk is None:  # what torch.distributed.checkpoint plans with
        known[cut] = chunk = value.__create_chunk_list__()[0]  # type: ignore[no-untyped-call]
    if tuple(chunk.sizes) != tuple(local.shape):
        raise CaptureError(path, "has a part of another size", expected=chunk, found=local.shape)
    if value.dtype not in SAFETENSORS_DTYPES and tuple(local.shape) != whole:
        raise CaptureError(path, "cannot be stored in shards", found=value.dtype)
    return Part(local, tuple(chunk.offsets), whole)


def empty_like(like: DTensor, dtype: torch.dtype) -> DTensor:
    """Return a sharded tensor without values, laid out as another one."""
    from torch.distributed.tensor import DTensor

    with torch.no_grad():
        local = torch.empty_like(like.to_local(), dtype=dtype, requires_grad=False)
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def same_cut(one: DTensor, other: object) -> bool:
    """Return whether two tensors are cut in the same way."""
    return (
        is_sharded(other)
        and other.shape == one.shape
        and other.device_mesh == one.device_mesh
        and other.placements == one.placements
    )


def settle(objects: object) -> None:
    """Bring the parameters of FSDP2 modules back into shards, where a forward gathered them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in _modules_in(objects):
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def how_cut(objects: object) -> list[str] | None:
    """Return how the parameters of modules are cut over ranks; None where none is.

    The size of a mesh of one dimension is the number of ranks, and not told again.
    """
    found = {
        f"{'x'.join(map(str, p.device_mesh.shape)) if p.device_mesh.ndim > 1 else 'ranks'}: "
        f"{', '.join(map(str, p.placements))}"
        for module in _modules_in(objects)
        for p in module.parameters(recurse=False)
        if is_sharded(p)
    }
    return sorted(found) or None


def _modules_in(value: object) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _modules_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _modules_in(item)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module was made of: `fully_shard` puts another one in its place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = type(module)
    if fsdp is not None and fsdp.FSDPModule in kind.__bases__:
        return next(base for base in kind.__bases__ if issubclass(base, nn.Module))
    return kind


# Tensors that come apart.


def comes_apart(value: object) -> bool:
    """Return whether a value is a tensor subclass whose inner tensors are all there is to it.

    PyTorch's own are none: a sharded tensor is stored by all ranks together, a nested one is not.
    """
    return isinstance(value, torch.Tensor) and _is_one(type(value))


def _is_one(kind: type) -> bool:
    if kind is torch.Tensor or kind.__module__.partition(".")[0] == "torch":
        return False
    return all(hasattr(kind, name) for name in _PROTOCOL)


def parts_of(value: Any) -> tuple[dict[str, Any], Any]:
    """Return the inner tensors of a tensor by name, and what else it is made with."""
    names, context = value.__tensor_flatten__()
    return {str(name): getattr(value, name) for name in names}, context


def classes_at_hand(objects: Iterable[object]) -> frozenset[type]:
    """Return the tensor subclasses that the modules of these optimizers' classes name.

    An optimizer makes its state in its first step. Before that its code alone tells of which
    classes it is.
    """
    found: set[type] = set()
    for one in objects:
        if isinstance(one, Optimizer):
            for kind in type(one).__mro__:
                found |= _named_in(vars(sys.modules.get(kind.__module__, object)))
    return frozenset(found)


def _named_in(space: Mapping[str, object]) -> set[type]:
    return {one for one in space.values() if isinstance(one, type) and _is_one(one)}
