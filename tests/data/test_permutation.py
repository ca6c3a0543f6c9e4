from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.feistel_reference import Reference
from unbroken.data import Permutation, derive_key
from unbroken.errors import ConfigError

# Committed for ever: another number here is another order of somebody's data.
GOLDEN = [
    (1, 0, [0]),
    (2, 1, [0, 1]),
    (5, 7, [4, 1, 0, 2, 3]),
    (16, 2**64 - 1, [3, 7, 8, 6, 0, 11]),
    (100, 42, [1, 94, 70, 89, 32, 35]),
    (65537, 42, [57913, 38812, 33428, 51842, 45932, 59131]),
    (2**40 + 1, 42, [257631190027, 256704046785, 540405997367, 764162177916]),
    (2**62, 3, [2047082708048752837, 3996472856243816361, 2135149387486578093]),
]
AROUND_POWERS = [2**k + d for k in range(12, 41) for d in (-1, 0, 1)] + [2**62 - 1, 2**62]


def permuted(n: int, key: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    return Permutation(n, key)(np.arange(start, n if stop is None else stop, dtype=np.uint64))


def is_bijection(n: int, key: int) -> bool:
    return bool((np.bincount(permuted(n, key).astype(np.int64), minlength=n) == 1).all())


@pytest.mark.parametrize(("n", "key", "values"), GOLDEN)
def test_the_order_is_the_same_for_ever(n, key, values):
    assert permuted(n, key, stop=len(values)).tolist() == values


def test_it_is_a_bijection_for_every_n_up_to_4096():
    assert all(is_bijection(n, key=derive_key(7, n)) for n in range(1, 4097))


@pytest.mark.parametrize("n", [4**k + 1 for k in range(1, 10)])
def test_no_sample_is_lost_at_four_to_the_k_plus_one(n):
    """grain 0.2.18 never shows one record, and shows one twice, at n = 65,537 and 262,145."""
    assert is_bijection(n, key=42)


@pytest.mark.parametrize("n", AROUND_POWERS)
def test_around_each_power_of_two_the_inverse_finds_every_position_again(n):
    starts = {0, n // 2, n - 64}
    inverse = Reference(n, key=n).inverse
    for start in starts:
        values = permuted(n, n, start, start + 64).tolist()
        assert [inverse(value) for value in values] == list(range(start, start + 64))


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_it_equals_the_reference_in_python_integers(n, key, data):
    positions = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    found = Permutation(n, key)(np.array(positions, dtype=np.uint64)).tolist()
    assert found == [Reference(n, key).forward(position) for position in positions]


def test_one_position_alone_gives_what_it_gives_among_many():
    alone = Permutation(1000, 5)
    assert [int(alone(np.uint64(p))) for p in range(1000)] == permuted(1000, 5).tolist()


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_orders_of_a_few_samples_are_equally_likely(n):
    keys = (derive_key(key, "chi") for key in range(3_000))
    _, counts = np.unique([permuted(n, key) for key in keys], axis=0, return_counts=True)
    orders = {3: 6, 4: 24, 5: 120}[n]
    chi_square = ((counts - 3_000 / orders) ** 2 / (3_000 / orders)).sum()
    assert len(counts) == orders
    assert abs(chi_square - (orders - 1)) < 4 * (2 * (orders - 1)) ** 0.5


def test_every_place_is_equally_likely_for_a_sample():
    places = np.array([permuted(37, derive_key(key))[5] for key in range(2_000)], dtype=np.int64)
    counts = np.bincount(places, minlength=37)
    assert ((counts - 2_000 / 37) ** 2 / (2_000 / 37)).sum() < 36 + 4 * 72**0.5


def test_neighbours_do_not_stay_together():
    values = permuted(100_000, 42).astype(np.float64)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / 100_000**0.5


def test_keys_that_differ_in_one_bit_give_unrelated_orders():
    orders = [permuted(10_000, 1 << bit) for bit in range(64)]
    assert max((a == b).sum() for a, b in pairwise(orders)) < 10


@pytest.mark.parametrize(("n", "key"), [(0, 0), (-1, 0), (2**62 + 1, 0), (5, -1), (5, 2**64)])
def test_n_and_key_out_of_range_are_refused(n, key):
    with pytest.raises(ConfigError, match=r"expected"):
        Permutation(n, key)


@pytest.mark.parametrize("position", [5, -1, 2**63])
def test_a_position_outside_is_refused(position):
    with pytest.raises(ConfigError, match="expected all < 5"):
        Permutation(5, 0)(np.array([position]).astype(np.uint64))
