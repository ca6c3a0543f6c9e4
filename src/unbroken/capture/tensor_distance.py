"""How far apart two tensors of the same type are, element by element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from unbroken.capture.stored_tensor import LeafSource, describe
from unbroken.capture.tensors import DTYPES, SAFETENSORS_DTYPES, byte_view, carrier, flat_bytes
from unbroken.errors import StateMismatchError

_CHUNK = 2**16  # elements that are compared at a time: what is in between stays in the cache
_BY_NAME = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_PARTS = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_INTEGERS = {
    getattr(torch, name): np.dtype(name)
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}
_UNSIGNED = {torch.float8_e8m0fnu}  # a floating type without a sign: its bits are in order
_PACKED = {torch.float4_e2m1fn_x2}  # two numbers in an element: no numbers are compared

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Distance:
    """How far apart two tensors are. Two elements differ when their bytes do.

    So 0.0 and -0.0 differ, and so do two NaNs of other payloads; a NaN does not differ from
    itself. Differences of numbers leave out the elements of which one is NaN; those are counted.

    Attributes:
        count: How many elements each tensor has.
        differing: How many of them differ.
        first: The index of the first that differs, in C order; None if none does.
        max_abs: The largest |a - b|, in float64; an exact int for integers. None if no two
            numbers differ, and for types that hold none: bool, and several values in one byte.
        max_rel: The largest |a - b| / max(|a|, |b|): 0 for 0.0 and -0.0, "inf" where one of the
            two is infinite.
        max_ulp: The most steps from one floating-point number to its neighbour that lie between
            a and b, over all real and imaginary parts. 0.0 and -0.0 are 0 steps apart, and the
            largest finite number is 1 step from infinity. None for integers.
        nan_a: At how many of the differing elements the first tensor is NaN.
        nan_b: At how many of the differing elements the second tensor is NaN.

    Example:
        >>> distance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])).first
        (1,)
    """

    count: int
    differing: int
    first: tuple[int, ...] | None
    max_abs: float | int | None
    max_rel: float | None
    max_ulp: int | None
    nan_a: int
    nan_b: int


def distance(a: torch.Tensor, b: torch.Tensor) -> Distance:
    """Compare two tensors element by element, as their bytes are.

    Steps between neighbours (ULPs) are counted as the difference of two integers: the bits of a
    floating-point number read as sign and magnitude, which have the order of the numbers.
    Source: Bruce Dawson, Comparing Floating Point Numbers, 2012,
    https://randomascii.wordpress.com/2012/02/25/comparing-floating-point-numbers-2012-edition/

    Args:
        a: A tensor on the CPU, of any dtype.
        b: One of the same dtype and shape.

    Raises:
        StateMismatchError: They have other dtypes or shapes.

    Example:
        >>> one = torch.tensor([1.0])
        >>> distance(one, torch.nextafter(one, 2 * one)).max_ulp
        1
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        what = "cannot be compared by element"
        raise StateMismatchError("distance", what, expected=describe(a), found=describe(b))
    part = _PARTS.get(a.dtype, a.dtype)
    ours, theirs = (_bits(tensor, part) for tensor in (a, b))
    tally = _Tally(part)
    for start in range(0, a.numel(), _CHUNK):
        tally.add(start, ours[start : start + _CHUNK], theirs[start : start + _CHUNK])
    return tally.result(tuple(a.shape))


def stored_distance(
    path: str, a: LeafSource, b: LeafSource, known: tuple[str, tuple[int, ...]] | None = None
) -> Distance:
    """Compare a leaf of two checkpoints; both are read whole, and verified on the way.

    Args:
        path: The path of the leaf; both manifests give it the same type and shape.
        a: The first checkpoint.
        b: The second checkpoint.
        known: Its dtype and shape as PyTorch has them, where the manifest has only bytes.

    Raises:
        CorruptCheckpointError: The bytes are not those that a manifest promises.
    """
    dtype, shape = _type_of(path, a, known)
    return distance(*(_read(path, source, dtype, shape) for source in (a, b)))


def _type_of(
    path: str, source: LeafSource, known: tuple[str, tuple[int, ...]] | None
) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the type under which the bytes of a leaf are numbers; plain bytes if there is none."""
    leaf = source.manifest.tensors[path]
    dtypes = [] if known is None else [(DTYPES.get(known[0]), known[1])]
    dtypes.append((_BY_NAME.get(leaf.dtype), leaf.shape))
    for dtype, shape in dtypes:
        if dtype is not None and math.prod(shape) * dtype.itemsize == leaf.nbytes:
            return dtype, shape
    return torch.uint8, (leaf.nbytes,)


def _read(
    path: str, source: LeafSource, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    block = torch.empty(shape, dtype=carrier(dtype))
    source.read_leaf_into(path, byte_view(block))
    return block.view(dtype)


def _bits(tensor: torch.Tensor, part: torch.dtype) -> Array:
    """Return a row of integers for each element: one, or one each for real and imaginary part."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    bits: Array = flat_bytes(plain).numpy().view(f"<i{part.itemsize}")
    return bits.reshape(tensor.numel(), tensor.dtype.itemsize // part.itemsize)


class _Tally:
    """Adds up what the pieces of two tensors show."""

    def __init__(self, part: torch.dtype) -> None:
        self._part = part
        self._differing = 0
        self._first: int | None = None
        self._nan_a = 0
        self._nan_b = 0
        self._largest: dict[str, Any] = {}

    def add(self, start: int, a: Array, b: Array) -> None:
        """Compare the bits of one piece, whose first element is number `start`."""
        at = np.flatnonzero((a != b).any(axis=1))
        if at.size == 0:
            return
        self._differing += at.size
        self._first = start + int(at[0]) if self._first is None else self._first
        if self._part in _INTEGERS:
            self._add_integers(a[at], b[at])
        elif self._part.is_floating_point and self._part not in _PACKED:
            with np.errstate(all="ignore"):
                self._add_floats(a[at], b[at])

    def result(self, shape: tuple[int, ...]) -> Distance:
        """Return what all pieces have shown."""
        index = None if self._first is None else np.unravel_index(self._first, shape)
        return Distance(
            count=math.prod(shape),
            differing=self._differing,
            first=None if index is None else tuple(int(position) for position in index),
            max_abs=self._largest.get("abs"),
            max_rel=self._largest.get("rel"),
            max_ulp=self._largest.get("ulp"),
            nan_a=self._nan_a,
            nan_b=self._nan_b,
        )

    def _add_integers(self, a: Array, b: Array) -> None:
        one, other = (bits.view(_INTEGERS[self._part]) for bits in (a, b))
        gap = _steps(one, other)
        scale = np.maximum(abs(one.astype(np.float64)), abs(other.astype(np.float64)))
        self._keep("abs", gap, int)
        self._keep("rel", gap.astype(np.float64) / scale, float)

    def _add_floats(self, a: Array, b: Array) -> None:
        one, other = (_numbers(bits, self._part) for bits in (a, b))
        self._nan_a += int(np.isnan(one).any(axis=1).sum())
        self._nan_b += int(np.isnan(other).any(axis=1).sum())
        is_number = ~(np.isnan(one) | np.isnan(other))
        steps = _steps(*(_in_order(bits[is_number], self._part) for bits in (a, b)))
        self._keep("ulp", steps, int)
        rows = is_number.all(axis=1)
        gap, rel = _gaps(one[rows], other[rows])
        self._keep("abs", gap, float)
        self._keep("rel", rel, float)

    def _keep(self, name: str, values: Array, kind: type[int] | type[float]) -> None:
        """Keep the largest value."""
        if values.size:
            value = kind(values.max())
            self._largest[name] = max(value, self._largest.get(name, value))


def _numbers(bits: Array, part: torch.dtype) -> Array:
    """Return the floating-point numbers of these bits as float64, which holds them all exactly."""
    numbers: Array = torch.from_numpy(bits).view(part).to(torch.float64).numpy()
    return numbers


def _in_order(bits: Array, part: torch.dtype) -> Array:
    """Return integers in the order of the numbers: neighbours are 1 apart, both zeros are 0."""
    if part in _UNSIGNED:
        return bits.view(np.uint8)
    lowest = np.iinfo(bits.dtype).min  # the bits of -0.0
    return np.where(bits < 0, lowest - bits, bits)


def _steps(a: Array, b: Array) -> Array:
    """Return |a - b| of integers, which always fits 64 bits without a sign."""
    wide = np.uint64 if a.dtype.kind == "u" else np.int64
    high, low = (ends.astype(wide).view(np.uint64) for ends in (np.maximum(a, b), np.minimum(a, b)))
    steps: Array = high - low
    return steps


def _gaps(a: Array, b: Array) -> tuple[Array, Array]:
    """Return |a - b|, and it in relation to the larger of |a| and |b|, of rows without NaN."""
    gap, scale = _length(_minus(a, b)), np.maximum(_length(a), _length(b))
    rel = gap / scale
    rel[scale == 0] = 0.0
    is_finite = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    rel[~is_finite] = np.inf
    large = is_finite & ~(np.isfinite(gap) & np.isfinite(scale))  # beyond what float64 holds
    one, other = a[large] / 8, b[large] / 8
    rel[large] = _length(_minus(one, other)) / np.maximum(_length(one), _length(other))
    return gap, rel


def _minus(a: Array, b: Array) -> Array:
    """Return a - b, and 0 where both are the same infinity."""
    return np.where(a == b, 0.0, a - b)


def _length(parts: Array) -> Array:
    """Return the absolute values of real or complex numbers."""
    length: Array = abs(parts[:, 0]) if parts.shape[1] == 1 else np.hypot(parts[:, 0], parts[:, 1])
    return length
