"""Hypothesis strategies for state trees with everything in them that a checkpoint can hold."""

from __future__ import annotations

import enum
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from capture.tree_equality import account

Point = namedtuple("Point", "x y")


class Color(enum.Enum):
    RED = "red"
    GREEN = (1, 2)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2
    ALL = 3


TYPES = (Point, Color, Level, Rights)
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
DTYPES = sorted(
    {v for v in vars(torch).values() if isinstance(v, torch.dtype)} - QUANTIZED, key=str
)

any_float = st.integers(0, 2**64 - 1).map(
    lambda bits: struct.unpack("<d", bits.to_bytes(8, "big"))[0]
)
any_text = st.text(st.characters(codec=None, exclude_categories=()), max_size=8)
members = st.sampled_from([*Color, *Level, *Rights, Rights(0)])
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(10, 20000).map(lambda digits: -(7**digits)),
    st.floats(),
    any_float,
    st.builds(complex, any_float, any_float),
    any_text,
    st.binary(max_size=8),
    members,
)
torch_values = st.sampled_from(
    [
        *DTYPES,
        torch.device("cpu"),
        torch.device("cuda", 3),
        torch.Size([2, 3]),
        torch.strided,
        torch.sparse_coo,
        torch.channels_last,
        torch.preserve_format,
    ]
)
array_dtypes = st.one_of(
    npst.scalar_dtypes(), npst.array_dtypes(allow_subarrays=True), st.just(np.dtype("<f2"))
)
arrays = npst.arrays(
    array_dtypes, npst.array_shapes(min_dims=0, min_side=0, max_side=3), fill=st.nothing()
)


@st.composite
def laid_out_arrays(draw):
    array = draw(arrays)
    if array.ndim and draw(st.booleans()):
        array = array.T if draw(st.booleans()) else array[::-1]
    if draw(st.booleans()):
        array = array.copy(order=draw(st.sampled_from("CF")))
        array.flags.writeable = draw(st.booleans())
    return array


numpy_scalars = npst.arrays(array_dtypes, (1,)).map(lambda array: array[0])


def from_bits(dtype, shape, bits):
    """Return a tensor with these bits, made without a kernel for its dtype."""
    carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    memory = torch.frombuffer(bytearray(bits), dtype=torch.uint8).clone()
    integers = memory.view(carrier.get(dtype.itemsize, torch.complex128))
    return integers.view(dtype).view(shape)


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(1, 3), max_size=4))
    nbytes = math.prod(shape) * dtype.itemsize
    tensor = from_bits(dtype, shape, draw(st.binary(min_size=nbytes, max_size=nbytes)))
    if shape and draw(st.booleans()):
        tensor = tensor.narrow(0, 0, draw(st.integers(0, shape[0])))
    return tensor


@st.composite
def seen_otherwise(draw, tree):
    """Return another view of the same memory."""
    tensor = tree.value
    for _ in range(draw(st.integers(0, 2))):
        if tensor.dim() == 0:
            tensor = tensor.expand(draw(st.integers(1, 3)))
        elif draw(st.booleans()):
            tensor = tensor.transpose(0, -1)
        else:
            length = draw(st.integers(0, tensor.shape[0]))
            first = draw(st.integers(0, tensor.shape[0] - length))
            tensor = tensor.narrow(0, first, length)
    if tensor.dtype in (torch.complex64, torch.complex128) and draw(st.booleans()):
        tensor = tensor.conj()
        tensor = tensor.imag if draw(st.booleans()) else tensor
    return Tree(tensor)


@st.composite
def in_role(draw, tree):
    tensor = tree.value
    number = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    trained = number and draw(st.booleans())
    role = draw(st.sampled_from(["tensor", "parameter", "buffer"]))
    if role == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=trained)
    if role == "buffer":
        return torch.nn.Buffer(tensor, persistent=draw(st.booleans()))
    return tensor.detach().requires_grad_(trained)


keys = st.one_of(
    plain,
    torch_values,
    st.tuples(plain, plain),
    st.frozensets(plain, max_size=2),
    st.builds(Point, plain, plain),
)


def containers(inner):
    items = st.lists(inner, max_size=3)
    dicts = st.one_of(
        st.dictionaries(any_text, inner, max_size=3), st.dictionaries(keys, inner, max_size=3)
    )
    return st.one_of(
        items,
        items.map(tuple),
        st.builds(Point, inner, inner),
        dicts,
        dicts.map(OrderedDict),
        st.builds(defaultdict, st.sampled_from([None, int, list, dict]), dicts),
        st.builds(deque, items, st.sampled_from([None, 3, 9])),
        st.sets(keys, max_size=3),
        st.frozensets(keys, max_size=3),
        st.builds(Counter, st.dictionaries(keys, st.integers(), max_size=3)),
        st.builds(lambda value: {"once": value, "twice": [value]}, inner),
    )


class Tree:
    """Holds a tree; its own `repr` does not fail for dtypes that torch cannot print."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return f"Tree{account(self.value)}"


@st.composite
def trees(draw):
    """Return a tree whose tensors share memory with each other now and then."""
    pool = draw(st.lists(tensors().map(Tree), min_size=1, max_size=3))
    number = st.integers(0, len(pool) - 1)
    views = number.flatmap(lambda n: seen_otherwise(pool[n])).flatmap(in_role)
    leaves = st.one_of(
        views,
        views,
        views,
        plain,
        torch_values,
        st.binary(max_size=8).map(bytearray),
        st.integers(1020, 1100).map(bytes),
        laid_out_arrays(),
        numpy_scalars,
        array_dtypes.map(np.dtype),
        number.map(lambda n: pool[n].value),
    )
    return Tree(draw(st.recursive(leaves, containers, max_leaves=12)))
