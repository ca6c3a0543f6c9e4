from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbroken.data import derive_key

PARTS = st.lists(st.integers() | st.text(), max_size=4)

# Committed for ever: another key is another order of somebody's data.
GOLDEN = [
    ((0,), 0xAC019B663A599FE6),
    ((42, "order", 0), 0xC77023E9A63CCEEA),
    ((42, "order", 1), 0x9A3BE7EEDE05502F),
    ((-1, "sample", 3, 17), 0x3B8845202B84B435),
    ((2**70, "ab", "c"), 0x17E7FB01DD4CCA0F),
    ((0, "é", -(2**65)), 0xFC8EB4D26F300557),
]


@pytest.mark.parametrize(("parts", "key"), GOLDEN)
def test_keys_are_the_same_for_ever(parts, key):
    assert derive_key(*parts) == key


@given(st.integers(), PARTS, st.integers(), PARTS)
def test_different_parts_give_different_keys(seed, parts, other_seed, other_parts):
    same = derive_key(seed, *parts) == derive_key(other_seed, *other_parts)
    assert same == ([seed, *parts] == [other_seed, *other_parts])


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab", "c"), ("a", "bc")), ((1,), ("1",)), ((), ("",)), ((0,), ("\0",)), ((-1,), (255,))],
)
def test_parts_that_look_alike_are_told_apart(one, other):
    assert derive_key(0, *one) != derive_key(0, *other)
