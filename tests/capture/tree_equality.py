"""An account of a tree that is equal for two trees only if they are the same: written for the
tests, from memory and strides, with nothing of the code that it judges."""

from __future__ import annotations

import ctypes
import struct
from collections import defaultdict, deque
from enum import Enum

import numpy as np
import torch


def account(tree):
    """Return types, bits, order, identity and shared memory of everything in `tree`."""
    teller = _Teller()
    return teller.tell(tree), teller.overlaps()


class _Teller:
    def __init__(self):
        self.seen, self.tensors = {}, []

    def tell(self, value):
        mutable = isinstance(value, (list, dict, set, deque, bytearray, np.ndarray, torch.Tensor))
        if mutable and id(value) in self.seen:
            return "the same as", self.seen[id(value)][0]
        if mutable:
            self.seen[id(value)] = (len(self.seen), value)
        return (type(value), *self.parts(value))

    def parts(self, value):
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, np.ndarray):
            flags = value.flags
            order = flags.f_contiguous and not flags.c_contiguous
            return repr(value.dtype), value.shape, order, flags.writeable, value.tobytes()
        if isinstance(value, np.generic):
            return repr(value.dtype), value.tobytes()
        if isinstance(value, float):
            return (struct.pack("<d", value),)
        if isinstance(value, complex):
            return (struct.pack("<dd", value.real, value.imag),)
        if isinstance(value, Enum):
            return value.name, value.value
        if type(value) is int:
            return (hex(value),)
        return self.container(value)

    def container(self, value):
        if isinstance(value, (set, frozenset)):
            return (sorted(repr(self.tell(item)) for item in value),)
        if isinstance(value, dict):
            factory = value.default_factory if isinstance(value, defaultdict) else None
            return factory, [(self.tell(key), self.tell(item)) for key, item in value.items()]
        if isinstance(value, (list, tuple, deque)):
            return getattr(value, "maxlen", None), [self.tell(item) for item in value]
        return (value if not isinstance(value, bytearray) else bytes(value),)

    def tensor(self, value):
        if value.is_quantized:
            return str(value.dtype), str(value.qscheme()), value.int_repr().numpy().tobytes()
        bits = memory(value)
        self.tensors.append((len(self.tensors), value))
        flags = value.requires_grad, value.is_conj(), value.is_neg(), bool(value.is_leaf)
        role = getattr(value, "_is_buffer", None), getattr(value, "persistent", None)
        return str(value.dtype), tuple(value.shape), strides(value), flags, role, bits.tobytes()

    def overlaps(self):
        """Return for every two tensors that share memory how they lie to each other."""
        found = []
        for i, one in self.tensors:
            for j, other in self.tensors[i + 1 :]:
                if (
                    one.numel()
                    and other.numel()
                    and start(one) < end(other)
                    and start(other) < end(one)
                ):
                    same = start(one) == start(other) and one.stride() == other.stride()
                    how = "alike" if same else (one.stride(), other.stride())
                    found.append((i, j, start(other) - start(one), how))
        return found


def start(tensor):
    return tensor.data_ptr()


def end(tensor):
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start(tensor) + (reach + 1) * tensor.element_size()


def strides(tensor):
    """Return how a tensor must lie in memory: a dense one as it lies, one with holes packed."""
    expanded = tuple(
        step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1
    )
    if any(expanded):
        return expanded
    dense = tensor.numel() == 0 or end(tensor) - start(tensor) == tensor.nbytes
    return tensor.stride() if dense else torch.empty(tensor.shape).stride()


def memory(tensor):
    """Return the bits of a tensor as they stand in memory, in logical order."""
    size = tensor.element_size()
    if tensor.numel() == 0:
        return np.empty(0, np.uint8)
    block = (ctypes.c_uint8 * (end(tensor) - start(tensor))).from_address(start(tensor))
    strides = (*(step * size for step in tensor.stride()), 1)
    view = np.lib.stride_tricks.as_strided(
        np.frombuffer(block, np.uint8), (*tensor.shape, size), strides
    )
    return view.copy()
