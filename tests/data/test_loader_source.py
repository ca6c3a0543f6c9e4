from __future__ import annotations

import logging
from fractions import Fraction

import pytest
import torch
from torch.utils.data import DataLoader

from data.data_sets import (
    NoisyDataset,
    NoisyStream,
    StatefulLoader,
    bytes_of,
    draws,
    read,
    source_of,
)
from unbroken.data import CountedSource, StatefulSource
from unbroken.errors import ConfigError, DataError


def shuffling_loader(workers: int = 0, **options) -> DataLoader:
    return DataLoader(NoisyDataset(22), batch_size=4, shuffle=True, num_workers=workers, **options)


def batches_with_ambient_noise():
    for index in range(7):
        yield torch.tensor([index, *draws()])


MAKERS = {
    "a shuffling loader": shuffling_loader,
    "a shuffling loader with workers": lambda: shuffling_loader(2),
    "a loader with a generator": lambda: shuffling_loader(generator=torch.Generator()),
    "a function": lambda: batches_with_ambient_noise,
    "an iterable data set": lambda: NoisyStream(22),
    "a loader over an iterable data set": lambda: DataLoader(NoisyStream(22), batch_size=4),
    "a stateful loader": lambda: StatefulLoader(22, 4),
}


@pytest.mark.parametrize("used", [0, 1, 5, 6, 8])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_it_continues_exactly_at_any_batch(make, used):
    whole = bytes_of(read(source_of(make()), 12))
    first, again = source_of(make()), source_of(make())
    head = read(first, used)
    again.load_state_dict(first.state_dict())
    assert bytes_of(head) + bytes_of(read(again, 12 - used)) == whole


def test_a_shuffling_loader_alone_does_not_repeat_itself():
    """The negative control: what the sources add is what makes a loader repeat."""
    first, second = (torch.cat(list(shuffling_loader())) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_epochs_differ(make):
    source = source_of(make())
    batches = read(source, 12)
    assert {micro.epoch for micro in batches} >= {0, 1}
    assert len({bytes_of([micro]) for micro in batches}) == 12


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_reading_leaves_the_ambient_generators_as_they_were(make):
    torch.manual_seed(3)
    expected = draws()[-1]
    torch.manual_seed(3)
    read(source_of(make()), 8)
    assert draws()[-1] == expected


class LiveState(StatefulLoader):
    """A loader whose state is the one that it goes on changing."""

    def __init__(self, n: int, size: int) -> None:
        super().__init__(n, size)
        self.live = {"place": [0], "seen": torch.zeros(1)}

    def __iter__(self):
        for batch in super().__iter__():
            self.live["place"][0] = self.given
            self.live["seen"] += 1
            yield batch

    def state_dict(self):
        return self.live

    def load_state_dict(self, state):
        self.given = state["place"][0]


def test_a_loader_may_go_on_changing_the_state_that_it_gave():
    whole = bytes_of(read(source_of(LiveState(22, 4)), 12))
    first, again = source_of(LiveState(22, 4)), source_of(LiveState(22, 4))
    batches = first.iterate()
    head = [next(batches), next(batches)]
    for micro in head:
        first.used(micro)
    state = first.state_dict()
    kept = str(state)
    next(batches), next(batches)  # read ahead: not used
    assert str(state) == kept
    again.load_state_dict(state)
    assert bytes_of(head) + bytes_of(read(again, 10)) == whole


def test_a_loader_is_told_its_epoch():
    batches = read(source_of(StatefulLoader(8, 4)), 6)
    assert [int(micro.data[0]) // 1000 for micro in batches] == [0, 0, 1, 1, 2, 2]


def test_batches_read_ahead_do_not_move_a_stateful_loader():
    source = source_of(StatefulLoader(22, 4))
    batches = source.iterate()
    first = next(batches)
    source.used(first)
    next(batches)
    assert source.state_dict()["loader_state"] == {"given": 4}


def test_short_last_batches_are_counted_as_they_are():
    source = source_of(shuffling_loader())
    assert [micro.after.samples for micro in read(source, 7)] == [4, 8, 12, 16, 20, 22, 26]


def test_an_iterable_of_samples_is_dealt_to_the_ranks():
    whole = bytes_of(read(source_of(NoisyStream(22)), 12))
    ranks = [read(source_of(NoisyStream(22), rank=r, world_size=2), 6) for r in (0, 1)]
    assert b"".join(bytes_of(list(both)) for both in zip(*ranks, strict=True)) == whole


def test_drop_last_leaves_out_the_samples_that_fill_no_micro_batch():
    source = source_of(NoisyStream(10), drop_last=True)
    assert [micro.epoch for micro in read(source, 4)] == [0, 0, 1, 1]


def test_a_pending_window_is_remembered():
    source = source_of(shuffling_loader(), size=12)
    read(source, 2)
    assert source.micro_batches_left() == 1


def test_the_length_of_an_epoch_is_told_where_it_is_known():
    assert source_of(shuffling_loader()).steps_per_epoch == Fraction(6, 2)
    assert source_of(NoisyStream(22)).steps_per_epoch is None


def test_skipping_is_shown_with_its_cost(caplog):
    seen: list[tuple[int, int, float]] = []
    source = source_of(shuffling_loader(), on_skip=lambda *report: seen.append(report))
    read(source, 3)
    with caplog.at_level(logging.WARNING, "unbroken.data"):
        read(source, 1)
    assert "skipping 3 items of epoch 0" in caplog.text
    assert seen[-1][:2] == (3, 3)


def test_skipping_reports_about_once_a_second():
    ticks = iter(range(1000))
    seen: list[int] = []
    source = source_of(shuffling_loader())
    timed = CountedSource(
        shuffling_loader(), seed=0, shape=source.shape, clock=lambda: next(ticks) / 2,
        on_skip=lambda done, total, seconds: seen.append(done),
    )  # fmt: skip
    read(timed, 5)
    read(timed, 1)
    assert seen == [2, 4, 5]


def test_nothing_is_skipped_at_the_start_of_an_epoch(caplog):
    read(source_of(shuffling_loader()), 1)
    assert caplog.text == ""


def test_the_kind_of_source_follows_from_what_the_loader_can():
    assert isinstance(source_of(StatefulLoader(22, 4)), StatefulSource)
    assert isinstance(source_of(shuffling_loader()), CountedSource)


class StatefulWithWorkers(StatefulLoader):
    num_workers = 2
    dataset = NoisyDataset(22)


class StatefulDeterministic(StatefulWithWorkers):
    dataset = tuple(range(22))


class BufferShuffledExamplesIterable:
    pass


class Mapped:
    ex_iterables = (BufferShuffledExamplesIterable(),)


class ShuffledStream(StatefulLoader):
    """As `datasets` builds an iterable data set that shuffles."""

    _ex_iterable = Mapped()


@pytest.mark.parametrize(
    ("loader", "kind"),
    [
        (StatefulWithWorkers(22, 4), CountedSource),
        (StatefulDeterministic(22, 4), StatefulSource),
        (ShuffledStream(22, 4), CountedSource),
    ],
)
def test_a_state_that_is_known_not_to_be_exact_is_not_used(loader, kind):
    assert type(source_of(loader)) is kind


def one_shot():
    yield from range(3)


REFUSED = {
    "cannot be started again": one_shot,
    "in_order=False": lambda: shuffling_loader(2, in_order=False),
    "persistent_workers": lambda: shuffling_loader(2, persistent_workers=True),
}


@pytest.mark.parametrize("what", REFUSED)
def test_loaders_that_cannot_be_replayed_are_refused_at_once(what):
    with pytest.raises(DataError, match=what) as caught:
        source_of(REFUSED[what]())
    assert caught.value.hint is not None


def exhausted_after_one_pass():
    batches = iter([torch.ones(4)] * 3)
    return lambda: batches


@pytest.mark.parametrize(
    ("loader", "epoch"), [(lambda: iter([]), 0), (exhausted_after_one_pass(), 1)]
)
def test_an_epoch_without_batches_is_an_error(loader, epoch):
    with pytest.raises(DataError, match=f"epoch {epoch} ended too early: expected at least 1"):
        read(source_of(loader), 4)


def test_an_epoch_that_became_shorter_is_an_error():
    source, shorter = source_of(lambda: iter([1] * 9)), source_of(lambda: iter([1] * 5))
    read(source, 7)
    shorter.load_state_dict(source.state_dict())
    with pytest.raises(DataError, match="expected at least 7 items, found 5"):
        next(shorter.iterate())


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"loader": StatefulLoader(22, 4)}, "kind"),
        ({"loader": DataLoader(NoisyDataset(40), batch_size=4)}, "n"),
        ({"loader": DataLoader(NoisyDataset(22), batch_size=2)}, "length"),
        ({"loader": DataLoader(NoisyDataset(22), batch_size=4, drop_last=True)}, "length"),
        ({"loader": shuffling_loader(2)}, "num_workers"),  # a sampler's order is another, too
        ({"seed": 1}, "seed"),
        ({"micro": 8}, "micro_batch_size"),
        ({"world_size": 2}, "world_size"),
    ],
)
def test_a_place_in_another_loader_is_refused_by_name(other, name):
    loader = other.pop("loader", shuffling_loader())
    with pytest.raises(DataError) as caught:
        source_of(loader, **other).load_state_dict(source_of(shuffling_loader()).state_dict())
    assert caught.value.where == f"data.{name}"


@pytest.mark.parametrize("options", [{"epoch_size": 8}, {"num_workers": 2}, {"collate_fn": list}])
def test_options_that_a_loader_decides_itself_are_refused(options):
    with pytest.raises(ConfigError, match="no meaning for a loader"):
        source_of(shuffling_loader(), **options)
