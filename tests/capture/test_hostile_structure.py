"""A structure made by an attacker gives a named error: no crash, no code, no memory bomb."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.round_trip import loaded, stored
from capture.trees import TYPES, trees
from unbroken.capture import decode, structure_from_bytes
from unbroken.errors import CorruptCheckpointError, UnbrokenError
from unbroken.store.format.typed_json import TAG

READER = stored({"x": torch.zeros(4), "empty": torch.zeros(0, dtype=torch.complex128)})
HUGE = 2**61


def tensor(**fields):
    return {TAG: "tensor", "leaf": "x", "dtype": "float32", "shape": [4], **fields}


MALFORMED = {
    "an unknown kind": {TAG: "pickle", "hex": "80"},
    "a kind that is no string": {TAG: ["tuple"]},
    "a tuple without items": {TAG: "tuple"},
    "a pair of three": {TAG: "dict", "items": [[1, 2, 3]]},
    "a list as a key": {TAG: "dict", "items": [[[], 1]]},
    "a key twice": {TAG: "dict", "items": [[1, 2], [True, 3]]},
    "an element twice": {TAG: "set", "items": [1, 1]},
    "a module as a factory": {TAG: "defaultdict", "factory": "os.system", "items": []},
    "a reference forward": [{TAG: "same", "as": 5}],
    "a reference to what contains it": [{TAG: "same", "as": 0}],
    "a wrong maxlen": {TAG: "deque", "maxlen": 1, "items": [1, 2]},
    "no hexadecimal": {TAG: "bytes", "hex": "zz"},
    "an integer of words": {TAG: "int", "hex": "0xcafé"},
    "a float of 3 bytes": {TAG: "float", "bits": "000000"},
    "half a character": {TAG: "str", "hex": "ff"},
    "an unknown dtype": {TAG: "torch.dtype", "name": "nn"},
    "an unknown device": {TAG: "torch.device", "name": "../../etc"},
    "an object dtype": {TAG: "numpy.scalar", "dtype": "|O", "hex": "00" * 8},
    "a dtype that is code": {TAG: "numpy.dtype", "dtype": "__import__('os')"},
    "an endless dtype": {TAG: "numpy.dtype", "dtype": "V" + "9" * 30},
    "a leaf that is not there": tensor(leaf="y"),
    "another dtype": tensor(dtype="int32"),
    "a leaf that is smaller": tensor(shape=[5]),
    "a leaf that is much smaller": tensor(shape=[HUGE]),
    "sizes whose product overflows": tensor(shape=[HUGE, HUGE, HUGE]),
    "a huge tensor of nothing": tensor(leaf="empty", dtype="complex128", shape=[0, HUGE, HUGE]),
    "a size below zero": tensor(shape=[-4]),
    "65 dimensions": tensor(shape=[4, *[1] * 64]),
    "a stride out of the memory": tensor(base={"dtype": "float32", "shape": [4]}, stride=[2]),
    "an offset out of the memory": tensor(base={"dtype": "float32", "shape": [4]}, offset=4),
    "an offset before the memory": tensor(base={"dtype": "float32", "shape": [4]}, offset=-4),
    "an offset inside an element": tensor(
        shape=[1], base={"dtype": "float32", "shape": [4]}, offset=2
    ),
    "a base with holes": tensor(base={"dtype": "float32", "shape": [4], "stride": [2]}),
    "a role that is code": tensor(role="torch.load"),
    "a conjugate of real numbers": tensor(conj=True),
    "an array of another size": {
        TAG: "numpy.ndarray",
        "dtype": "<f4",
        "shape": [HUGE],
        "leaf": "x",
    },
    "an array of empty objects": {TAG: "numpy.ndarray", "dtype": "|V0", "shape": [4], "leaf": "x"},
    "a quantized tensor of floats": {TAG: "quantized", "dtype": "qint8", "integers": tensor()},
}


@pytest.mark.parametrize("structure", MALFORMED.values(), ids=MALFORMED)
def test_it_is_refused(structure):
    with pytest.raises(CorruptCheckpointError):
        decode(structure, READER)


def test_the_well_formed_original_is_accepted():
    assert decode(tensor(), READER).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}x", '{"a": 1, "a": 2}', "NaN", "1" * 5000, str(2**53), '"\xff"', ""],
    ids=lambda text: text[:12],
)
def test_text_that_is_no_strict_json_is_refused(text):
    with pytest.raises(CorruptCheckpointError, match=r"^state\.json: "):
        structure_from_bytes(text.encode("latin-1"), "state.json")


def test_a_structure_nested_without_end_is_refused():
    structure = 1
    for _ in range(900):
        structure = [structure]
    with pytest.raises(CorruptCheckpointError, match="nested deeper"):
        decode(structure, READER)


JUNK = st.sampled_from([None, True, -1, 7, 2**53, 1.5, "", "same", "x", [], {}, [[]], {TAG: 1}])


@settings(max_examples=300)
@given(trees(), st.randoms(use_true_random=False), JUNK, st.booleans())
def test_any_change_of_a_structure_gives_a_tree_or_a_named_error(tree, chance, junk, lazy):
    reader = stored(tree.value)
    structure = json.loads(reader.read_file("state.json"))
    changed = _with_junk(structure, chance, junk)
    with suppress(UnbrokenError):
        decode(changed, reader, types=TYPES, lazy=lazy)


def _with_junk(structure: object, chance: random.Random, junk: object) -> object:
    """Put `junk` somewhere into the structure, or take something out."""
    holders = [node for node in _nodes(structure) if isinstance(node, (dict, list)) and node]
    if not holders:
        return junk
    holder = chance.choice(holders)
    key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    if chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = junk
    return structure


def _nodes(node: object) -> list[object]:
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [node, *(deeper for child in inner for deeper in _nodes(child))]


def test_a_damaged_leaf_is_refused_before_it_is_given_out():
    reader = stored({"x": torch.zeros(4)})
    name = "checkpoint-1/state.safetensors"
    with reader.storage.open(name) as handle:
        data = bytearray(handle.nbytes)
        handle.read_into(0, memoryview(data))
    data[-1] ^= 1
    reader.storage.remove_file(name)
    with reader.storage.create(name) as handle:
        handle.write(bytes(data))
    with pytest.raises(CorruptCheckpointError, match="x"):
        loaded(reader)
