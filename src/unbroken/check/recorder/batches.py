"""Digests of batches: of the whole, and of each sample in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .digests import TensorDigester, digest_of, hash_of

MAX_ROWS = 256
_MAX_DEPTH = 6
_ROW_DIGITS = 12
_NO_MEMORY = ("FakeTensor", "FunctionalTensor")


def batch_digest(batch: Any, digester: TensorDigester) -> list[Any] | None:
    """Return the digest of a batch and those of its samples; None if it holds no data.

    Data are tensors that are no parameters and that no operation with gradients has made, numpy
    arrays, numbers and text, in any nesting of mappings, sequences and dataclasses. The
    samples are the rows of the tensors that are as long as the first one; of more than 256 rows
    none is told apart.
    """
    parts = list(_parts(batch, 0))
    tensors = [part for part in parts if isinstance(part, Tensor)]
    rest = repr([part for part in parts if not isinstance(part, Tensor)]).encode()
    if not tensors and not any(not isinstance(part, Tensor) for part in parts):
        return None
    pieces = [digester.of(tensor) + str(tuple(tensor.shape)).encode() for tensor in tensors]
    return [digest_of(b"".join(pieces) + rest), _rows(tensors, digester)]


def _parts(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, Tensor):
        if _is_data(value):
            yield value
    elif isinstance(value, (str, bytes, int, float)):
        yield value
    elif _is_array(value):
        yield torch.from_numpy(value.copy())
    elif depth < _MAX_DEPTH:
        for inner in _inner(value):
            yield from _parts(inner, depth + 1)


def _inner(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        return iter(value.values())
    if isinstance(value, (list, tuple)):
        return iter(value)
    return iter(vars(value).values()) if is_dataclass(type(value)) else iter(())


def _is_data(tensor: Tensor) -> bool:
    if type(tensor).__name__ in _NO_MEMORY or torch._C._functorch.is_functorch_wrapped_tensor(  # noqa: SLF001
        tensor
    ):
        return False
    return tensor.grad_fn is None and not isinstance(tensor, nn.Parameter)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf"


def _rows(tensors: list[Tensor], digester: TensorDigester) -> list[str]:
    tall = [tensor for tensor in tensors if tensor.dim() > 0]
    count = len(tall[0]) if tall else 0
    if not 0 < count <= MAX_ROWS:
        return []
    same = [tensor for tensor in tall if len(tensor) == count]
    per_tensor = [[digester.of(row) for row in tensor] for tensor in same]
    return [hash_of(b"".join(row)).hex()[:_ROW_DIGITS] for row in zip(*per_tensor, strict=True)]
