"""Any state tree comes back from a checkpoint as it was: types, bits, order, identity, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from capture.round_trip import loaded, stored, there_and_back
from capture.tree_equality import account
from capture.trees import DTYPES, TYPES, Color, Level, Point, from_bits, trees
from unbroken.capture import encode, file_of, load_tensors, types_in
from unbroken.capture.codec.scalars import SCALARS
from unbroken.capture.codec.values import CODECS
from unbroken.store.format.typed_json import TAGS


@settings(max_examples=300)
@given(trees())
def test_any_tree_comes_back_the_same(tree):
    assert account(there_and_back(tree.value, TYPES)) == account(tree.value)


@settings(max_examples=100)
@given(trees())
def test_a_lazy_tree_loads_to_the_same(tree):
    lazy = loaded(stored(tree.value), types=TYPES, lazy=True)
    assert account(load_tensors(lazy, "cpu")) == account(tree.value)


@settings(max_examples=100)
@given(trees())
def test_equal_trees_are_stored_as_equal_bytes(tree):
    again = there_and_back(tree.value, TYPES)
    assert stored(again).manifest.state_digest == stored(tree.value).manifest.state_digest


def test_the_account_of_a_tree_sees_one_flipped_bit():
    tensor = torch.arange(3.0)
    before = account([tensor])
    tensor.view(torch.uint8)[5] ^= 1
    assert account([tensor]) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ((1,), [1]),
        ("a", b"a"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))),
        (torch.zeros(2, 3), torch.zeros(3, 2).t()),
        (np.float32(1), np.float64(1)),
    ],
    ids=repr,
)
def test_the_account_of_a_tree_tells_these_apart(one, other):
    assert account(one) != account(other)


def test_the_account_of_a_tree_sees_memory_that_is_shared_no_more():
    tensor = torch.arange(6.0)
    assert account([tensor, tensor[1:]]) != account([tensor, tensor[1:].clone()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_every_bit(dtype):
    tensor = from_bits(dtype, (2, 4), bytes(range(256 - 8 * dtype.itemsize, 256)))
    assert account(there_and_back(tensor)) == account(tensor)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
def test_quantized_tensors_come_back_with_their_scales(dtype):
    values, scales, zeros = torch.randn(3, 2), torch.rand(3, dtype=torch.double), torch.arange(3)
    tensor = torch.quantize_per_tensor(values, 0.1, 2, dtype)
    channels = torch.quantize_per_channel(values, scales, zeros, 0, dtype)
    again, again_channels = there_and_back([tensor, channels])
    assert account([again, again_channels]) == account([tensor, channels])
    assert (again.q_scale(), again.q_zero_point()) == (0.1, 2)
    assert account(again_channels.q_per_channel_scales()) == account(scales)


def test_an_integer_of_20000_digits_comes_back():
    assert there_and_back(7**20000) == 7**20000


def test_tied_tensors_are_stored_once_and_tied_again():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    reader = stored({"wte": weight, "head": weight, "data": weight.data, "t": weight.data.t()})
    again = loaded(reader)
    assert len(reader.manifest.tensors) == 1
    assert again["wte"] is again["head"]
    assert again["wte"].data_ptr() == again["data"].data_ptr() == again["t"].data_ptr()


BYTES = torch.arange(32, dtype=torch.uint8)
VIEWS = {
    "conjugated": [torch.randn(3, dtype=torch.complex64).conj()],
    "negated": [torch.randn(3, dtype=torch.complex64).conj().imag],
    "conjugated and not": [c := torch.randn(3, dtype=torch.complex64), c.conj()],
    "channels last": [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)],
    "sliding": [torch.arange(9.0).unfold(0, 4, 2)],
    "partly overlapping": [x := torch.arange(9.0)[1:6], x[2:]],
    "interleaved": [y := torch.arange(12.0).view(6, 2)[:, 0], y[1::2]],
    "of other dtypes": [BYTES[4:12].view(torch.float32), BYTES[8:24].view(torch.float64)],
    "real and imaginary": [c.real, c.imag],
}


@pytest.mark.parametrize("tree", VIEWS.values(), ids=VIEWS)
def test_a_view_comes_back_as_it_lay(tree):
    assert account(there_and_back(tree)) == account(tree)


def test_neighbours_in_memory_are_stored_each_on_its_own():
    tensor = torch.arange(6.0)
    leaves = encode({"a": tensor[:3], "b": tensor[3:]}).leaves
    assert [(leaf.path, leaf.shape) for leaf in leaves] == [("a", (3,)), ("b", (3,))]


def test_an_expanded_tensor_is_stored_small():
    leaf = encode(torch.randn(3, 1).expand(3, 1000)).leaves[0]
    assert leaf.shape == (3, 1)


def test_a_column_of_a_large_tensor_is_stored_without_the_rest():
    assert encode(torch.randn(100, 100)[:, 7]).leaves[0].nbytes == 400


def test_leaves_with_the_same_path_are_told_apart():
    tree = {
        "a": {"b": torch.zeros(1)},
        "a.b": torch.ones(1),
        "": torch.ones(2),
        "value": b"x" * 2000,
    }
    assert account(there_and_back(tree)) == account(tree)


def test_a_leaf_comes_in_chunks_of_16_mib_at_most():
    leaf = encode(torch.arange(5_000_000)).leaves[0]
    sizes = [len(chunk) for chunk in leaf.chunks()]
    assert sizes == [2**24, 2**24, 40_000_000 - 2**25]


def test_leaves_are_the_live_memory_and_no_copy():
    tensor, array = torch.zeros(4), np.zeros(4)
    leaves = encode([array, tensor]).leaves
    assert [leaf.tensor.data_ptr() for leaf in leaves] == [array.ctypes.data, tensor.data_ptr()]


@pytest.mark.parametrize(
    ("path", "file", "name"),
    [
        ("model.transformer.wte.weight", "model.safetensors", "transformer.wte.weight"),
        ("model:buffers.attn.mask", "buffers.safetensors", "model:buffers.attn.mask"),
        ("model:extra_state.fp8.scale", "state.safetensors", "model:extra_state.fp8.scale"),
        ("model.__metadata__", "state.safetensors", "model.__metadata__"),
        ("optimizer.state.w.exp_avg", "optimizer.safetensors", "state.w.exp_avg"),
        ("gradients.w", "gradients.safetensors", "gradients.w"),
        ("rng.torch", "state.safetensors", "rng.torch"),
    ],
)
def test_each_leaf_has_its_file(path, file, name):
    assert file_of(path) == (file, name)


def test_types_in_finds_the_classes_that_a_tree_needs():
    tree = {"a": [Point(Color.RED, {Level.LOW: 1})]}
    assert types_in(tree) == {Point, Color, Level}
    assert there_and_back(tree, types_in(tree)) == tree


def test_each_tag_of_the_format_is_written_and_read_by_one_table():
    assert {*CODECS, *SCALARS, "same"} - {"list"} == TAGS.keys()
