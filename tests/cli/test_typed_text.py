"""A value of the state reads as Python has it, and two that differ never read the same."""

from __future__ import annotations

import pytest

from unbroken.cli.diff import text_of, texts_of


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (None, "null"),
        (1e-5, "1e-05"),
        ("cosine", "cosine"),
        (["a", 1], '["a", 1]'),
        ({"n": {"x": True}}, "{n: {x: true}}"),
        ({"$": "float", "bits": "fff0000000000000"}, "-inf"),
        ({"$": "float", "bits": "7ff8000000000000"}, "nan"),
        ({"$": "float", "bits": "7ff8000000000001"}, "nan with the bits 7ff8000000000001"),
        ({"$": "int", "hex": "-0x20000000000000"}, "-9007199254740992"),
        ({"$": "complex", "bits": "3ff00000000000004000000000000000"}, "(1+2j)"),
        ({"$": "tuple", "items": [0.9, {"$": "tuple", "items": []}]}, "(0.9, ())"),
        ({"$": "set", "items": [1]}, "{1}"),
        ({"$": "bytes", "hex": "6162"}, "b'ab'"),
        ({"$": "torch.dtype", "name": "float32"}, "float32"),
        ({"$": "enum", "type": "m.Color", "name": "RED"}, "m.Color.RED"),
        ({"$": "numpy.scalar", "dtype": "<f4", "hex": "0000803f"}, "numpy <f4 1.0"),
        ({"$": "tensor", "leaf": "w", "dtype": "float32", "shape": [2, 3]}, "tensor float32[2, 3]"),
        ({"$": "object", "kind": "optimizer", "class": "AdamW"}, "optimizer AdamW"),
        ({"$": "same", "as": "model"}, "the same object as model"),
        ({"$": "tuple", "items": list(range(99))}, "a tuple of 99"),
        ({str(i): i for i in range(99)}, "a mapping of 99"),
        ({"$": "float", "bits": "no bits"}, '{"$": "float", "bits": "no bits"}'),
        ({"$": "tuple", "items": 3}, '{"$": "tuple", "items": 3}'),
        (
            {"$": "numpy.scalar", "dtype": [], "hex": ""},
            '{"$": "numpy.scalar", "dtype": [], "hex": ""}',
        ),
    ],
)
def test_a_value_of_the_state_is_written_as_a_person_reads_it(raw, text):
    assert text_of(raw) == text


def test_two_values_that_differ_never_read_the_same():
    assert texts_of("1", 1) == ('"1"', "1")
    assert texts_of(list(range(99)), list(range(1, 100)))[0].startswith("[0, 1, 2")
    one, other = texts_of("x" * 500 + "a", "x" * 500 + "b")
    assert (one, other) == ("..." + "x" * 20 + "a", "..." + "x" * 20 + "b")
    assert len(set(texts_of("x" * 500, "x" * 501))) == 2
