"""Names of torch dtypes, and tensors seen as plain bytes or integers."""

from __future__ import annotations

import numpy as np
import torch

DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
"""Every dtype of this torch by its name; the only dtypes that a checkpoint can name."""

SAFETENSORS_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
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
        place = (flat.data_ptr(), False)
        self.__array_interface__ = {
            "data": place,
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
    """Tell whether the elements fill one block of memory, each place once, in any order."""
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
    """Tell whether two strides address the same memory; a dimension of size 1 has no say."""
    if 0 in shape:
        return True
    return all(size == 1 or a == b for size, a, b in zip(shape, one, other, strict=True))
