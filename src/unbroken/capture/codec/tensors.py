"""A tensor's node in the structure: its place in memory, its role and its flags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from unbroken.capture.codec.memory_layout import Placement, TensorLayout
from unbroken.capture.codec.scalars import decode_device
from unbroken.capture.codec.typed_json import (
    Json,
    get,
    get_flag,
    get_int,
    get_numbers,
    get_shape,
    malformed,
)
from unbroken.capture.dtypes import DTYPES, QUANTIZED, contiguous_stride, dtype_name
from unbroken.capture.sharded import is_sharded
from unbroken.capture.stored_tensor import LeafSource, StoredSubclass, StoredTensor
from unbroken.errors import CaptureError

_ROLES = ("tensor", "parameter", "buffer", "non-persistent buffer")


def check_tensor(value: torch.Tensor, path: str) -> None:
    """Raise unless the tensor is one whose memory is all there is to it, or a sharded one."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) and not is_sharded(value):
        raise CaptureError(
            path,
            "is a tensor subclass, which cannot be stored",
            found=f"{type(value).__module__}.{type(value).__qualname__}",
            hint="give plain tensors, or a class with __tensor_flatten__ and __tensor_unflatten__",
        )
    if value.is_nested or value.layout != torch.strided or value.device.type == "meta":
        found = "a nested tensor" if value.is_nested else f"{value.layout} on {value.device}"
        hint = "use dense tensors with data: to_dense(), to_padded_tensor(), to_empty()"
        raise CaptureError(path, "cannot be stored", found=found, hint=hint)
    check_graph(value, path)
    if value.is_quantized and value.dtype not in QUANTIZED:
        raise CaptureError(path, "cannot be stored", found=f"a tensor of {value.dtype}")


def check_graph(value: torch.Tensor, path: str) -> None:
    """Raise if the tensor is the result of operations that gradients may flow through."""
    if value.grad_fn is not None:
        hint = "store its value with detach()"
        raise CaptureError(path, "is part of an autograd graph", found=value.grad_fn, hint=hint)


def physical(value: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor as it is, without lazy conjugation and negation."""
    value = value.detach()
    value = torch._neg_view(value) if value.is_neg() else value  # noqa: SLF001 (no public name)
    return value.conj() if value.is_conj() else value


def describe_flags(value: torch.Tensor) -> dict[str, Json]:
    """Return what a tensor is besides its memory; nothing that is as usual."""
    flags: dict[str, Json] = {}
    if isinstance(value, torch.nn.Parameter):
        flags["role"] = "parameter"
    elif getattr(value, "_is_buffer", False):
        persistent = getattr(value, "persistent", True)
        flags["role"] = "buffer" if persistent else "non-persistent buffer"
    if value.device.type != "cpu":
        flags["device"] = str(value.device)
    marks = {"requires_grad": value.requires_grad, "conj": value.is_conj(), "neg": value.is_neg()}
    return {**flags, **{key: True for key, on in marks.items() if on}}


def describe_placement(where: Placement) -> dict[str, Json]:
    """Return where a tensor lies; nothing that is as usual."""
    node: dict[str, Json] = {"leaf": where.leaf, **_describe_layout(where.view)}
    if where.offset:
        node["offset"] = where.offset
    if where.base != where.view:
        node["base"] = _describe_layout(where.base)
    return node


def _describe_layout(layout: TensorLayout) -> dict[str, Json]:
    node: dict[str, Json] = {"dtype": dtype_name(layout.dtype), "shape": [*layout.shape]}
    if layout.stride != contiguous_stride(layout.shape):
        node["stride"] = [*layout.stride]
    return node


def read_tensor(node: Json, path: str, leaf: str, source: LeafSource) -> StoredTensor:
    """Return the tensor that a node describes, checked against the manifest."""
    view = _read_layout(node, path)
    base = _read_layout(get(node, "base", dict, path), path) if "base" in node else view
    offset = get_int(node, "offset", path, default=0)
    role = node.get("role", "tensor")
    requires_grad, conj, neg = (get_flag(node, k, path) for k in ("requires_grad", "conj", "neg"))
    device = str(decode_device({"device": "cpu", **node}, "device", path))
    outside = offset < 0 or offset + view.extent > base.extent or offset % view.dtype.itemsize
    if outside or not base.is_dense or role not in _ROLES:
        raise malformed(path, "a tensor that does not fit its memory")
    number = view.dtype.is_floating_point or view.dtype.is_complex
    if (requires_grad and not number) or (conj and not view.dtype.is_complex):
        raise malformed(path, "flags that do not fit the dtype", dtype_name(view.dtype))
    stored = StoredTensor(leaf, base, view, offset, device, role, requires_grad, conj, neg, source)
    stored.check_region()
    return stored


def read_subclass(
    node: Json, path: str, parts: Mapping[str, Any], context: Any, kind: type | None
) -> StoredSubclass:
    """Return the tensor subclass that a node describes.

    Args:
        node: The node.
        path: Its path.
        parts: The inner tensors, decoded.
        context: What else it is made with, decoded.
        kind: The class here that has the stored name; None: there is none.
    """
    role, dtype = node.get("role", "tensor"), DTYPES.get(get(node, "dtype", str, path))
    shape, stride = get_numbers(node, "shape", path), get_numbers(node, "stride", path)
    if role not in _ROLES or dtype is None or len(shape) != len(stride):
        raise malformed(path, "not a tensor of any class")
    device = str(decode_device({"device": "cpu", **node}, "device", path))
    about = (dtype, shape, stride, device, role, get_flag(node, "requires_grad", path))
    return StoredSubclass(path, get(node, "type", str, path), kind, parts, context, *about)


def _read_layout(node: Json, path: str) -> TensorLayout:
    name = get(node, "dtype", str, path)
    dtype = DTYPES.get(name)
    if dtype is None or dtype in QUANTIZED:
        raise malformed(path, "a dtype that this torch does not know", name)
    shape = get_shape(node, path, dtype.itemsize)
    stride = get_numbers(node, "stride", path) if "stride" in node else contiguous_stride(shape)
    if len(stride) != len(shape) or any(step >= 2**62 for step in stride):
        raise malformed(path, "strides that do not fit the shape", stride)
    return TensorLayout(dtype, shape, stride)


def build_quantized(node: Json, values: Any, scale: Any, zero: Any, path: str) -> torch.Tensor:
    """Return the quantized tensor of these integers, scales and zero points."""
    dtype = DTYPES.get(get(node, "dtype", str, path))
    integers = None if dtype is None else QUANTIZED.get(dtype)
    if integers is None or not isinstance(values, torch.Tensor) or values.dtype != integers:
        raise malformed(path, "not the integers of a quantized tensor")
    if "axis" not in node:
        if type(scale) is not float or type(zero) is not int:
            raise malformed(path, "not the scale of a quantized tensor")
        return torch._make_per_tensor_quantized_tensor(values, scale, zero)  # noqa: SLF001
    axis = get_int(node, "axis", path)
    count = (values.shape[axis],) if 0 <= axis < values.dim() else None
    if any(not isinstance(part, torch.Tensor) or part.shape != count for part in (scale, zero)):
        raise malformed(path, "not the scales of a quantized tensor")
    return torch._make_per_channel_quantized_tensor(values, scale, zero, axis)  # noqa: SLF001
