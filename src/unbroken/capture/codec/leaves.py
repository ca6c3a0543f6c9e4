"""Leaves: the pieces of a state tree that are stored as bytes in safetensors files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from unbroken.capture.dtypes import SAFETENSORS_DTYPES, flat_bytes, memory_view, raw
from unbroken.store.format.safetensors_file import Copied

FileOf = Callable[[str], tuple[str, str]]
"""Gives for the path of a leaf the file that it goes into and its name there."""

_CHUNK = 16 * 2**20
_OTHER_FILE = "state.safetensors"
_RESERVED_NAMES = {"buffers", "gradients", "state"}


class TensorLeaf(NamedTuple):  # thousands are made while a training waits: fast to make
    """The bytes of one tensor, to be stored; refers to the live memory and copies nothing.

    Args:
        path: Unique in the checkpoint, such as "optimizer.state.wte.weight.exp_avg".
        file: The file that it goes into.
        name: Its key in that file.
        dtype: Its safetensors dtype; "U8" for bytes of any other kind.
        shape: Its shape in the file.
        tensor: The live tensor whose elements, in C order, are the bytes.
        sharded: The tensor that several ranks hold, if this is what one of them has of it.
        offsets: Of a part of it that is not all of it, where it starts there, by dimension.
        global_shape: Of such a part, the shape of the whole.
        copied: The copy that is stored, if there is one, whatever becomes of the live tensor.
    """

    path: str
    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    sharded: torch.Tensor | None = None
    offsets: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None
    copied: Copied | None = None

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.tensor.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes in C order, at most 16 MiB at a time."""
        if self.copied is not None:
            end = self.copied.start + self.nbytes
            for start in range(self.copied.start, end, _CHUNK):
                yield self.copied.memory[start : min(start + _CHUNK, end)]
            return
        flat = flat_bytes(raw(self.tensor).contiguous())
        for start in range(0, flat.numel(), _CHUNK):
            yield memory_view(flat[start : start + _CHUNK].cpu())


def stored_as(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """Return the safetensors dtype and shape under which such a tensor is stored."""
    if dtype in SAFETENSORS_DTYPES:
        return SAFETENSORS_DTYPES[dtype], shape
    count = dtype.itemsize
    for size in shape:
        count *= size
    return "U8", (count,)


def file_layout(own_files: Mapping[str, str]) -> FileOf:
    """Return the rule that gives each leaf its file and its name there.

    Args:
        own_files: For each object with a file of its own, that file: {"ema": "ema.safetensors"}.
            Leaves of such an object stand there under their own names, so that a model's file
            is what `from_pretrained` expects. Buffers that are not persistent go to
            "buffers.safetensors", gradients to "gradients.safetensors", all else to
            "state.safetensors", each under its whole path.

    Example:
        >>> file_of = file_layout({"ema": "ema.safetensors"})
        >>> file_of("ema.module.wte.weight")
        ('ema.safetensors', 'module.wte.weight')
        >>> file_of("ema:buffers.module.mask")
        ('buffers.safetensors', 'ema:buffers.module.mask')
    """
    return _FileLayout({**own_files})


@dataclass(frozen=True)
class _FileLayout:
    """The rule; equal ones give every leaf the same file."""

    own_files: Mapping[str, str]

    def __call__(self, path: str) -> tuple[str, str]:
        head, _, name = path.partition(".")
        owner, _, fact = head.partition(":")
        if fact == "buffers":
            return "buffers.safetensors", path
        if owner == "gradients":
            return "gradients.safetensors", path
        if owner not in self.own_files:
            return _OTHER_FILE, path
        plain = name != "" and not fact and name != "__metadata__"
        return (self.own_files[owner], name) if plain else (_OTHER_FILE, path)


def own_file(name: str) -> str | None:
    """Return the file of its own for an object of this name, None where the name cannot be one."""
    safe = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return f"{name}.safetensors" if safe and name not in _RESERVED_NAMES else None


file_of = file_layout({"model": "model.safetensors", "optimizer": "optimizer.safetensors"})
"""The rule for one object called "model" and one called "optimizer"."""
