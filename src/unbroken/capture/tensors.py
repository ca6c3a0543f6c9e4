"""What kinds of tensors there are: their dtypes, their memory as bytes, and their subclasses.

A sharded tensor (`DTensor`) is described in the structure as the whole tensor that it is a part of,
so a checkpoint has the same tensors however many ranks saved it; how they are sharded stands in the
manifest alone. `torch.distributed.tensor` is not imported here: where nobody has imported it,
there are no such tensors.

Other subclasses, such as quantized ones of torchao, come apart into plain tensors. PyTorch's
protocol for them is `__tensor_flatten__`, which names the inner tensors and gives the rest of what
makes the tensor, and `__tensor_unflatten__`, which puts it together again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from unbroken.errors import CaptureError
from unbroken.store.format.safetensors_file import TORCH_DTYPES

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PROTOCOL = ("__tensor_flatten__", "__tensor_unflatten__")

DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
"""Every dtype of this torch by its name; the only dtypes that a checkpoint can name."""

SAFETENSORS_DTYPES = {DTYPES[name]: stored for name, stored in TORCH_DTYPES.items()}
"""The dtypes that every reader of safetensors files knows; others are stored as raw bytes, "U8"."""

QUANTIZED = {
    torch.qint8: torch.int8,
    torch.quint8: torch.uint8,
    torch.qint32: torch.int32,
}
"""The integers behind the quantized dtypes that are stored."""

_CARRIERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def carrier(dtype: torch.dtype) -> torch.dtype:
    """Return a dtype of the same size whose copies keep every bit and exist on every device."""
    return _CARRIERS[dtype.itemsize]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view on the same memory as integers; copies of it keep every bit.

    `tensor` must not be a conjugate or negative view.
    """
    return tensor.detach().view(carrier(tensor.dtype))


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as a vector of bytes."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    start = tensor.storage_offset() * tensor.element_size()
    length = tensor.numel() * tensor.element_size()
    return flat.set_(tensor.untyped_storage(), start, (length,), (1,))


def byte_view(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as a writable buffer."""
    return memory_view(flat_bytes(tensor))


class _Memory:
    """What NumPy asks for the memory of a tensor; it keeps the tensor alive."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.__array_interface__ = {
            "data": (flat.data_ptr(), False),
            "shape": (flat.numel(),),
            "typestr": "|u1",
            "version": 3,
        }
        self._flat = flat


def memory_view(flat: torch.Tensor) -> memoryview:
    """Return the memory of a vector of bytes on the CPU as a writable buffer.

    `Tensor.numpy` would forbid the memory to grow for ever, and a buffer that grows in place
    (`resize_`) could not go on after a save.
    """
    return np.asarray(_Memory(flat)).data if flat.numel() else memoryview(bytearray())


def is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether the elements fill one block of memory, each address once, in any order."""
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size > 1:
            if step != expected:
                return False
            expected *= size
    return True


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a C-ordered tensor of this shape."""
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def same_layout(shape: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether two strides address the same memory; a dimension of size 1 has no say."""
    if 0 in shape:
        return True
    return all(size == 1 or a == b for size, a, b in zip(shape, one, other, strict=True))


# Sharded tensors.


@dataclass(frozen=True)
class Part:
    """The part of a sharded tensor that this rank holds; it may be empty, or all of it.

    `offsets` is where it starts in the whole tensor, by dimension; `global_shape` is the shape of
    the whole.
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
"""Which part of sharded tensors is here, by their sharding: torch takes 50 us to find it."""


def part_of(value: DTensor, path: str, known: Chunks | None = None) -> Part:
    """Return what this rank holds of a sharded tensor.

    `known` caches the answer by sharding.

    Raises:
        CaptureError: It is a sum still to be made, or of a type that cannot be sharded.
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
    sharding = (value.device_mesh, value.placements, whole)
    chunk = known.get(sharding)
    if chunk is None:  # what torch.distributed.checkpoint plans with
        known[sharding] = chunk = value.__create_chunk_list__()[0]  # type: ignore[no-untyped-call]
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
    """Return whether two tensors are sharded in the same way."""
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
    """Return how the parameters of modules are sharded over ranks; None where none is.

    The size of a mesh of one dimension is the number of ranks, which stands elsewhere.
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
    """Return the class that a module was made of: `fully_shard` replaces it."""
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

    An optimizer makes its state in its first step. Before that, only its code names the
    classes of it.
    """
    found: set[type] = set()
    for one in objects:
        if isinstance(one, Optimizer):
            for kind in type(one).__mro__:
                found |= _named_in(vars(sys.modules.get(kind.__module__, object)))
    return frozenset(found)


def _named_in(space: Mapping[str, object]) -> set[type]:
    return {one for one in space.values() if isinstance(one, type) and _is_one(one)}
