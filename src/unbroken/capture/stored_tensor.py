"""Tensors that lie in a checkpoint and are read when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from unbroken.capture.codec.leaves import TensorLayout, stored_as
from unbroken.capture.codec.scalars import decode_device
from unbroken.capture.state_tree import TreeMap
from unbroken.capture.tensors import (
    DTYPES,
    QUANTIZED,
    Chunks,
    byte_view,
    carrier,
    contiguous_stride,
    dtype_name,
    empty_like,
    is_sharded,
    part_of,
    parts_of,
    raw,
)
from unbroken.errors import CorruptCheckpointError, StateMismatchError
from unbroken.store import Box
from unbroken.store.format.typed_json import (
    Json,
    get,
    get_flag,
    get_int,
    get_numbers,
    get_shape,
    malformed,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_ROLES = ("tensor", "parameter", "buffer", "non-persistent buffer")


class StoredLeaf(Protocol):
    """What a checkpoint's manifest knows of one leaf."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""

    @property
    def dtype(self) -> str:
        """Its safetensors dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, however it is sharded."""


class LeafIndex(Protocol):
    """The part of a manifest that lists the leaves."""

    @property
    def tensors(self) -> Mapping[str, StoredLeaf]:
        """The leaves by their paths."""


class LeafSource(Protocol):
    """Where the bytes of leaves come from; `unbroken.store.CheckpointReader` is one."""

    @property
    def manifest(self) -> LeafIndex:
        """Lists the leaves."""

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        """Fill `buffer` with the verified bytes of the leaf."""

    def read_box_into(
        self, path: str, offsets: tuple[int, ...], shape: tuple[int, ...], buffer: memoryview, /
    ) -> None:
        """Fill `buffer` with the verified bytes of a part of the leaf."""


_Request = tuple[str, Box | None, memoryview]


class Filling:
    """Memory that is to be filled with leaves: all are read together, several at once.

    Until `finish` the memory holds anything.
    """

    def __init__(self) -> None:
        self.chunks: Chunks = {}  # the parts of sharded tensors that are here
        self._requests: dict[int, tuple[LeafSource, list[_Request]]] = {}

    def add(
        self, source: LeafSource, path: str, buffer: memoryview, part: Box | None = None
    ) -> None:
        """Note that `buffer` is to get the leaf at `path`, or a part of it."""
        self._requests.setdefault(id(source), (source, []))[1].append((path, part, buffer))

    def finish(self) -> None:
        """Fill all memory.

        Raises:
            CorruptCheckpointError: Bytes are not those that the manifest promises.
        """
        for source, requests in self._requests.values():
            read_together = getattr(source, "read_boxes_into", None)
            if read_together is not None:
                read_together(requests)
                continue
            for path, part, buffer in requests:
                _read(source, path, buffer, part)
        self._requests.clear()


def _read(source: LeafSource, path: str, buffer: memoryview, part: Box | None) -> None:
    if part is None:
        source.read_leaf_into(path, buffer)
    else:
        source.read_box_into(path, part.offsets, part.shape, buffer)


Blocks = dict[tuple[str, TensorLayout, str], torch.Tensor]
"""Blocks of memory that were read already, so that tensors on the same block share it."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint: all is known of it but its elements, which `load` reads.

    Args:
        path: Path of the leaf that holds its bytes.
        base: Layout of that leaf in memory.
        view: Layout of the tensor itself on this memory.
        offset: Bytes from the start of the memory to the first element.
        device: The device that the tensor was captured from, such as "cuda:0".
        role: "tensor", "parameter", "buffer" or "non-persistent buffer".
        requires_grad: As it was.
        conj: Whether it was a lazily conjugated view.
        neg: Whether it was a lazily negated view.
        source: Where the bytes come from.
    """

    path: str
    base: TensorLayout
    view: TensorLayout
    offset: int
    device: str
    role: str
    requires_grad: bool
    conj: bool
    neg: bool
    source: LeafSource = field(repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.view.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.view.shape

    @property
    def view_key(self) -> tuple[object, ...]:
        """Equal for two tensors when they are the same view of the same memory."""
        return (self.path, self.view, self.offset)

    def load(
        self,
        device: torch.device | str = "cpu",
        blocks: Blocks | None = None,
        later: Filling | None = None,
    ) -> torch.Tensor:
        """Read the tensor: same bits, dtype, shape, strides, role and `requires_grad`.

        Args:
            device: Where to put it.
            blocks: Blocks read before; tensors loaded with the same mapping share memory again.
            later: Fills the tensor when it is finished; None: at once.

        Returns:
            A new tensor.

        Raises:
            CorruptCheckpointError: The bytes are not those that the manifest promises.
        """
        blocks = {} if blocks is None else blocks
        key = (self.path, self.base, str(device))
        if key not in blocks:
            on_cpu = torch.device(device).type == "cpu"
            blocks[key] = self._read_block(later if on_cpu else None).to(device)
        return self._in_role(self._view_on(blocks[key]))

    def copy_into(self, tensor: torch.Tensor, later: Filling | None = None) -> None:
        """Overwrite `tensor` with the stored bits, in place.

        The bytes are read straight into the tensor's memory where it is contiguous, on the CPU;
        otherwise through one buffer of the tensor's size.

        Args:
            tensor: A tensor of the same dtype and shape.
            later: Fills the tensor when it is finished; None, or if it cannot: at once.

        Raises:
            StateMismatchError: It has another dtype or shape; it was not changed.
            CorruptCheckpointError: The bytes are not those that the manifest promises.
        """
        if (tensor.dtype, tuple(tensor.shape)) != (self.dtype, self.shape):
            raise StateMismatchError(
                self.path, "has another shape or dtype", expected=self, found=describe(tensor)
            )
        if is_sharded(tensor):
            self._copy_part_into(tensor, later)
        elif self._fills(tensor):
            self._fill(tensor, later)
        elif self.conj or self.neg or tensor.is_conj() or tensor.is_neg():
            tensor.detach().copy_(self.load())
        else:
            raw(tensor).copy_(raw(self.load()))
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)

    def load_like(self, like: torch.Tensor, later: Filling | None = None) -> torch.Tensor:
        """Read the tensor into a new one on the device of `like`, sharded as that one is.

        Args:
            like: The tensor to be like.
            later: Fills the new one when it is finished, if it is sharded; None: at once.

        Raises:
            StateMismatchError: `like` is sharded, and has another shape.
            CorruptCheckpointError: The bytes are not those that the manifest promises.
        """
        if not is_sharded(like):
            return self.load(like.device)
        found = empty_like(like, self.dtype)
        self.copy_into(found, later)
        return found

    def _copy_part_into(self, tensor: DTensor, later: Filling | None) -> None:
        """Overwrite what this rank holds of a sharded tensor; no more is read than is needed."""
        part = part_of(tensor, self.path, None if later is None else later.chunks)
        here = part.tensor
        if self.base != self.view or self.offset or self.conj or self.neg:
            narrow = tuple(
                slice(at, at + size) for at, size in zip(part.offsets, part.shape, strict=True)
            )
            here.copy_(self.load()[narrow])
        elif here.device.type == "cpu" and here.is_contiguous():
            self._fill(here, later, Box(part.offsets, part.shape))
        else:
            block = torch.empty(part.shape, dtype=carrier(self.dtype))
            self.source.read_box_into(self.path, part.offsets, part.shape, byte_view(block))
            raw(here).copy_(block)

    def __str__(self) -> str:
        """Return dtype and shape, such as "float32[3, 4]"."""
        return f"{dtype_name(self.dtype)}{list(self.shape)}"

    def is_like(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor has this one's dtype, shape and strides, and no role."""
        whole = self.base == self.view == TensorLayout.of(tensor) and self.offset == 0
        lazy = self.conj or self.neg or tensor.is_conj() or tensor.is_neg()
        bare = self.role == "tensor" and not self.requires_grad and not tensor.requires_grad
        return whole and bare and not lazy

    def _fills(self, tensor: torch.Tensor) -> bool:
        """Return whether the stored bytes are those of the tensor's memory, in this order."""
        plain = not (self.conj or self.neg or tensor.is_conj() or tensor.is_neg())
        whole = self.base == self.view and self.offset == 0
        return plain and whole and tensor.device.type == "cpu" and tensor.is_contiguous()

    def _fill(self, tensor: torch.Tensor, later: Filling | None, part: Box | None = None) -> None:
        hand_over = getattr(self.source, "hand_over", None)  # of bytes that were read before
        if part is None and hand_over is not None and hand_over(self.path, tensor):
            return
        if later is None:
            _read(self.source, self.path, byte_view(tensor), part)
        else:
            later.add(self.source, self.path, byte_view(tensor), part)

    def _read_block(self, later: Filling | None) -> torch.Tensor:
        """Read the leaf into new memory that is laid out as the base says."""
        block = torch.empty(self.base.shape, dtype=carrier(self.base.dtype))
        self._fill(block, later if self.base.is_contiguous else None)
        if self.base.is_contiguous:
            return block
        strided = torch.empty_strided(self.base.shape, self.base.stride, dtype=block.dtype)
        return strided.copy_(block)

    def check_region(self) -> None:
        """Raise unless the manifest knows the leaf with this dtype, shape and size."""
        leaf = self.source.manifest.tensors[self.path]
        dtype, shape = stored_as(self.base.dtype, self.base.shape)
        nbytes = self.base.numel * self.base.dtype.itemsize
        found = (leaf.dtype, tuple(leaf.shape), leaf.nbytes)
        if found != (dtype, shape, nbytes):
            raise CorruptCheckpointError(
                self.path,
                "the structure and the manifest disagree",
                expected=f"{dtype}{list(shape)}",
                found=f"{leaf.dtype}{list(leaf.shape)}",
            )

    def _view_on(self, block: torch.Tensor) -> torch.Tensor:
        size = self.dtype.itemsize
        tensor = torch.empty(0, dtype=carrier(self.dtype), device=block.device)
        tensor.set_(block.untyped_storage(), self.offset // size, self.shape, self.view.stride)
        tensor = tensor.view(self.dtype)
        tensor = tensor.conj() if self.conj else tensor
        return torch._neg_view(tensor) if self.neg else tensor  # noqa: SLF001 (no public name)

    def _in_role(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.role == "parameter":
            return torch.nn.Parameter(tensor, requires_grad=self.requires_grad)
        if self.role != "tensor":
            tensor = torch.nn.Buffer(tensor, persistent=self.role == "buffer")
        return tensor.requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class StoredSubclass:
    """A tensor subclass in a checkpoint: its inner tensors, and what puts them together.

    Args:
        path: Its own path; the leaves have those of the inner tensors.
        type_name: The full name of its class; only ever compared.
        kind: The class here that has this name; None: there is none.
        parts: The inner tensors by name.
        context: What else `__tensor_unflatten__` takes.
        role: "tensor", "parameter", "buffer" or "non-persistent buffer".
        requires_grad: As it was.
    """

    path: str
    type_name: str
    kind: type | None
    parts: Mapping[str, Any]
    context: Any
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    role: str
    requires_grad: bool

    @property
    def view_key(self) -> tuple[object, ...]:
        """Equal for two tensors when they are the same one."""
        return (self.path,)

    def load(
        self, device: torch.device | str = "cpu", blocks: Blocks | None = None
    ) -> torch.Tensor:
        """Read the inner tensors and put them together, by the class that this process has.

        Raises:
            StateMismatchError: No such class is at hand, or it does not take them.
            CorruptCheckpointError: The bytes are not those that the manifest promises.
        """
        if self.kind is None:
            hint = f"pass the class itself: types=[{self.type_name.rpartition('.')[2]}]"
            what = "is a tensor of a class that was not given"
            raise StateMismatchError(self.path, what, expected=self.type_name, hint=hint)
        parts = {name: load_tensors(part, device, blocks) for name, part in self.parts.items()}
        context, unflatten = load_tensors(self.context), self.kind.__tensor_unflatten__  # type: ignore[attr-defined]
        try:
            tensor = unflatten(parts, context, torch.Size(self.shape), self.stride)
        except Exception as error:  # the class may raise anything at parts that are not its own
            what = f"{self.type_name} does not take the stored parts"
            raise StateMismatchError(self.path, what, found=error) from error
        found = (type(tensor), tensor.dtype, tuple(tensor.shape))
        if found != (self.kind, self.dtype, self.shape):
            what = f"{self.type_name} made another tensor of the stored parts"
            raise StateMismatchError(self.path, what, expected=self, found=describe(tensor))
        if self.role == "parameter":
            return torch.nn.Parameter(tensor, requires_grad=self.requires_grad)
        return tensor.requires_grad_(self.requires_grad)  # type: ignore[no-any-return]

    def copy_into(self, tensor: Any, later: Filling | None = None) -> None:
        """Overwrite the inner tensors of a tensor of the same class, in place."""
        inner, _ = parts_of(tensor)
        for name, part in self.parts.items():
            if part is not None:
                part.copy_into(inner[name], later)

    def __str__(self) -> str:
        """Return class, dtype and shape, such as "OptimState8bit float32[3, 4]"."""
        name = self.type_name.rpartition(".")[2]
        return f"{name} {dtype_name(self.dtype)}{list(self.shape)}"


def load_tensors(
    tree: Any, device: torch.device | str | None = None, blocks: Blocks | None = None
) -> Any:
    """Return `tree` with every stored tensor loaded; tensors that shared memory share it again.

    Args:
        tree: A state tree as `decode(..., lazy=True)` returns it.
        device: Where to put the tensors; None for the kind of device that each came from.
        blocks: Blocks read before.

    Raises:
        StateMismatchError: This machine has no device of the kind that a tensor came from.
    """
    blocks = {} if blocks is None else blocks

    def load(value: Any) -> Any:
        if not isinstance(value, StoredTensor | StoredSubclass):
            return value
        return value.load(home(value) if device is None else device, blocks)

    return TreeMap(load)(tree)


def home(stored: StoredTensor | StoredSubclass) -> torch.device:
    """Return this machine's device for a tensor: its own, or the current one of the same kind."""
    device = torch.device(stored.device)
    if device.type == "cpu":
        return device
    available = torch.accelerator.is_available()
    found = torch.accelerator.current_accelerator() if available else torch.device("cpu")
    if found is None or found.type != device.type:
        raise StateMismatchError(
            stored.path,
            "was captured from a device that this machine lacks",
            expected=device,
            found=found,
            hint="resume on a machine with such a device",
        )
    here = (device.index or 0) < torch.accelerator.device_count()
    return device if here else torch.device(device.type, torch.accelerator.current_device_index())


def is_stored_tensor(value: object) -> bool:
    """Return whether a decoded value is a tensor, loaded or not."""
    return isinstance(value, StoredTensor | StoredSubclass | torch.Tensor)


def describe(tensor: torch.Tensor) -> str:
    """Return dtype and shape, such as "float32[3, 4]"."""
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


# From the node of a tensor in the structure; nothing in it is trusted.


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

    `parts` are the inner tensors and `context` what else it is made with, both decoded; `kind` is
    the class here that has the stored name, None where there is none.
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
