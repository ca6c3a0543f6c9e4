from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unbroken.data import GlobalOrder, SampleKey
from unbroken.errors import ConfigError, DataError


def test_the_stream_is_the_same_for_ever():
    golden = [745, 664, 354, 203, 121, 419, 875, 174, 341, 59]
    assert GlobalOrder(1000, seed=42).samples(995, 1005).tolist() == golden


@pytest.mark.parametrize("n", [1, 7, 4095, 4096, 4097, 10_000])
def test_each_epoch_has_every_sample_once(n):
    order = GlobalOrder(n, seed=1)
    for epoch in (0, 1, 5):
        assert sorted(order.samples(epoch * n, (epoch + 1) * n)) == list(range(n))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(GlobalOrder(50, s).samples(e * 50, e * 50 + 50)) for s in (1, 2) for e in (0, 1)
    ]
    assert len(set(orders)) == 4


@given(st.integers(1, 9000), st.integers(0, 10**18), st.integers(0, 200), st.integers(0, 200))
def test_any_cut_of_the_stream_gives_the_same_stream(n, start, first, second):
    order, middle, stop = GlobalOrder(n, seed=3), start + first, start + first + second
    parts = [*order.samples(start, middle), *order.samples(middle, stop)]
    assert parts == GlobalOrder(n, seed=3).samples(start, stop).tolist()


def test_without_shuffling_it_is_the_order_of_the_data_set():
    assert GlobalOrder(4, 0, shuffle=False).samples(2, 10).tolist() == [2, 3, 0, 1, 2, 3, 0, 1]


def test_a_smaller_epoch_uses_another_part_of_the_data_each_time():
    order = GlobalOrder(100, seed=0, epoch_size=10)
    epochs = [set(order.samples(e * 10, e * 10 + 10).tolist()) for e in range(5)]
    assert [len(epoch) for epoch in epochs] == [10] * 5
    assert len(set().union(*epochs)) > 30


def test_a_position_knows_its_epoch_and_its_place_in_it():
    order = GlobalOrder(10, seed=0, epoch_size=8)
    assert [(order.epoch(p), order.offset(p)) for p in (0, 7, 8, 17)] == [
        (0, 0), (0, 7), (1, 0), (2, 1),
    ]  # fmt: skip


def test_a_key_knows_the_epoch_of_its_place_where_an_epoch_is_smaller_than_the_data():
    keys = GlobalOrder(10, seed=0, epoch_size=8).keys(6, 10)
    assert [(key.epoch, key.position) for key in keys] == [(0, 6), (0, 7), (1, 8), (1, 9)]


def test_a_sample_key_survives_the_way_to_a_worker():
    key = pickle.loads(pickle.dumps(SampleKey(5, epoch=2, position=25)))
    assert (key, key.epoch, key.position, type(key)) == (5, 2, 25, SampleKey)


def test_an_empty_data_set_is_refused():
    with pytest.raises(DataError, match="empty: expected at least 1 sample, found 0"):
        GlobalOrder(0, seed=0)


@pytest.mark.parametrize("size", [0, -1, 11])
def test_an_epoch_of_more_samples_than_there_are_is_refused(size):
    with pytest.raises(ConfigError, match="expected 1 to 10"):
        GlobalOrder(10, seed=0, epoch_size=size)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2)])
def test_positions_out_of_range_are_refused(start, stop):
    with pytest.raises(ConfigError, match="0 <= start <= stop"):
        GlobalOrder(10, seed=0).samples(start, stop)
