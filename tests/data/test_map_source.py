from __future__ import annotations

import multiprocessing
from fractions import Fraction
from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from data.data_sets import NoisyDataset, bytes_of, draws, read, source_of
from unbroken.data import BatchSource, GlobalOrder, MicroBatchSampler, Position
from unbroken.errors import ConfigError, DataError

N, G = 53, 16  # 53 is prime: steps span epochs


def reading(micro=4, workers=0, world=1, start=0, stop=6 * G, **options) -> bytes:
    """The bytes of what all ranks read between two positions, in the order of the stream."""
    ranks = []
    for rank in range(world):
        source = source_of(
            NoisyDataset(N), size=G, micro=micro, num_workers=workers, rank=rank,
            world_size=world, **options,
        )  # fmt: skip
        source.position = Position(start)
        ranks += read(source, (stop - start) // (micro * world))
    ranks.sort(key=lambda batch: batch.first_position)
    return bytes_of(ranks)


@pytest.fixture(scope="module")
def uninterrupted() -> bytes:
    return reading()


CUTS = [(1, 1), (1, 16), (2, 2), (2, 8), (4, 4), (8, 2)]
READINGS = [(world, micro, w) for world, micro in CUTS for w in ((0, 1, 2) if world < 4 else (0,))]


@pytest.mark.parametrize(("world", "micro", "workers"), READINGS)
def test_samples_and_their_noise_are_the_same_however_they_are_read(
    uninterrupted, world, micro, workers
):
    assert reading(micro, workers, world) == uninterrupted


def test_unkeyed_noise_depends_on_the_workers():
    """The negative control: the same sampler, the same data set, but no keys."""

    def unkeyed(workers: int) -> bytes:
        sampler = MicroBatchSampler(GlobalOrder(N, 42), G, 4)
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(
            NoisyDataset(N), batch_sampler=sampler, num_workers=workers, generator=generator
        )
        torch.manual_seed(0)
        return b"".join(batch.numpy().tobytes() for batch in islice(loader, 8))

    assert unkeyed(1) != unkeyed(2)


@pytest.mark.parametrize("used", [1, 3, 4, 13, 14, 23])
@pytest.mark.parametrize("workers", [0, 2])
def test_it_continues_exactly_after_any_micro_batch(uninterrupted, used, workers):
    rest = reading(start=4 * used, workers=workers)
    assert rest == uninterrupted[-len(rest) :]


def test_it_continues_from_its_state_inside_an_accumulation_window(uninterrupted):
    source, again = (source_of(NoisyDataset(N), size=G) for _ in range(2))
    head = read(source, 6)
    again.load_state_dict(source.state_dict())
    assert again.micro_batches_left() == 2
    assert bytes_of(head) + bytes_of(read(again, 18)) == uninterrupted


def test_steps_of_another_size_are_counted_from_where_they_began_at_every_later_start():
    first = source_of(range(N), size=8)
    read(first, 2)
    states, size = [first.state_dict()], 12
    for _ in range(3):
        source = source_of(range(N), size=size, may_change=["global_batch_size"])
        source.load_state_dict(states[-1])
        assert source.micro_batches_left() == 3
        read(source, 3)
        states.append(source.state_dict())
    assert [state["samples"] for state in states] == [8, 20, 32, 44]
    assert [state["steps_from"] for state in states] == [0, 8, 8, 8]


def test_a_window_begun_on_one_rank_is_finished_on_two(uninterrupted):
    assert reading(stop=24) + reading(start=24, world=2) == uninterrupted


def test_batches_read_ahead_do_not_move_the_position():
    source = source_of(NoisyDataset(N), num_workers=2)
    first, *_ = islice(source.iterate(), 5)
    source.used(first)
    source.close()
    assert source.state_dict()["samples"] == 4


def test_the_state_is_small_and_plain():
    assert source_of(NoisyDataset(N), size=G).state_dict() == {
        "kind": "map", "n": N, "seed": 42, "order": "feistel-1", "shuffle": True,
        "epoch_size": N, "global_batch_size": G, "samples": 0, "steps_from": 0,
    }  # fmt: skip


class Counting(NoisyDataset):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def test_continuing_far_away_reads_nothing_before_it():
    data = Counting(10**9)
    source = source_of(data)
    source.position = Position(8 * 10**15)
    read(source, 1)
    assert data.reads == 4


def test_reading_leaves_the_ambient_generators_as_they_were():
    torch.manual_seed(3)
    expected = draws()[-1]
    torch.manual_seed(3)
    read(source_of(NoisyDataset(N)), 3)
    assert draws()[-1] == expected


def test_micro_batches_know_their_place():
    source = source_of(range(10), size=8, micro=2, rank=1, world_size=2)
    places = [(m.first_position, m.epoch, m.samples, m.after.samples) for m in read(source, 3)]
    assert places == [(4, 0, 2, 4), (6, 0, 2, 8), (12, 1, 2, 12)]


def test_drop_last_leaves_out_what_fills_no_global_batch():
    source = source_of(range(10), size=4, micro=4, drop_last=True, shuffle=False)
    assert [micro.data.tolist() for micro in read(source, 3)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3],
    ]  # fmt: skip
    assert source.steps_per_epoch == 2


def test_without_drop_last_every_sample_of_an_epoch_is_used_once():
    source = source_of(range(10), size=4, micro=4)
    seen = torch.cat([micro.data for micro in read(source, 5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert source.steps_per_epoch == Fraction(5, 2)


def test_a_smaller_epoch_size_shortens_the_epoch():
    assert source_of(range(100), epoch_size=24).steps_per_epoch == 3


@pytest.mark.parametrize("data", [list(range(9)), tuple(range(9)), Subset(range(99), range(9))])
def test_plain_containers_are_data_sets(data):
    assert torch.cat([micro.data for micro in read(source_of(data), 2)]).numel() == 8


class Broken(NoisyDataset):
    def __getitem__(self, index):
        raise LookupError("no such picture")


def broken_collator(samples):
    raise LookupError("no such shape")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("data", "collate_fn", "told"),
    [
        (Broken(N), None, "in the data set's sample 0 (epoch 0, position 0)"),
        (NoisyDataset(N), broken_collator, "in the collator, for the samples [0, 1, 2, 3]"),
    ],
)
def test_an_error_in_the_data_names_the_samples(data, collate_fn, told, workers):
    source = source_of(data, shuffle=False, num_workers=workers, collate_fn=collate_fn)
    with pytest.raises(LookupError) as caught:
        next(source.iterate())
    assert told in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


def test_close_shuts_the_workers_down():
    before = set(multiprocessing.active_children())
    source = source_of(NoisyDataset(N), num_workers=2)
    next(source.iterate())
    assert len(set(multiprocessing.active_children()) - before) == 2
    source.close()
    assert set(multiprocessing.active_children()) <= before


def test_workers_end_when_one_of_them_fails():
    before = set(multiprocessing.active_children())
    with pytest.raises(LookupError) as caught:
        next(source_of(Broken(N), num_workers=2).iterate())
    assert set(multiprocessing.active_children()) <= before
    assert caught.value.__traceback__ is not None  # while the error is still held


def test_workers_that_are_spawned_read_the_same(uninterrupted):
    found = reading(workers=1, stop=G, multiprocessing_context="spawn")
    assert found == uninterrupted[: len(found)]


def test_reading_anew_ends_the_pass_before():
    source = source_of(NoisyDataset(N))
    old = source.iterate()
    next(old)
    source.iterate()
    assert list(old) == []


class Printed(list):
    fingerprint = "abc"


class Reprinted(list):
    fingerprint = "abd"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"data": range(54)}, "n"),
        ({"seed": 43}, "seed"),
        ({"size": 4}, "global_batch_size"),
        ({"shuffle": False}, "shuffle"),
        ({"epoch_size": 16}, "epoch_size"),
        ({"drop_last": True}, "epoch_size"),
        ({"data": [[1]] * 3}, "kind"),
        ({"data": Reprinted(range(53))}, "fingerprint"),
    ],
)
def test_a_position_in_another_order_is_refused_by_name(options, name):
    options = {"data": Printed(range(53)), **options}
    data = options.pop("data")
    other = source_of((lambda: iter(data)) if name == "kind" else data, **options)
    with pytest.raises(DataError) as caught:
        other.load_state_dict(source_of(Printed(range(53))).state_dict())
    assert caught.value.where == f"data.{name}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty: expected at least 1 sample, found 0"),
        ([1, 2, 3], "smaller than a global batch: expected at least 8 samples, found 3"),
        ({"train": [1]}, "a mapping is no data set: found keys"),
        ("train.txt", "a string is no data set"),
        (5, "neither a data set nor an iterable"),
    ],
)
def test_what_is_no_usable_data_set_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        source_of(data)


@pytest.mark.parametrize(
    "options",
    [{"num_workers": -1}, {"epoch_size": 0}, {"epoch_size": 99}, {"size": -8}, {"micro": 3}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        source_of(range(53), **options)


@pytest.mark.parametrize("data", [range(53), DataLoader(range(9)), lambda: iter([1])])
def test_every_source_keeps_the_protocol(data):
    assert isinstance(source_of(data, size=1, micro=1), BatchSource)
