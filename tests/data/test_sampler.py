from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from unbroken.data import BatchShape, GlobalOrder, MicroBatchSampler
from unbroken.errors import ConfigError

N, G = 53, 16
CUTS = [(w, m) for w in (1, 2, 4, 8) for m in (1, 2, 4, 8, 16) if G % (w * m) == 0]


def stream(world: int, micro: int, start: int, stop: int) -> list[int]:
    """What all ranks use, put together as the definition says: step by step, rank by rank."""
    ranks = [
        iter(MicroBatchSampler(GlobalOrder(N, 7), G, micro, rank, world, start))
        for rank in range(world)
    ]
    used = []
    while start < stop:
        rest = G - start % G  # of the step
        rounds = range(rest // (world * micro))
        used += [key for rank in ranks for _ in rounds for key in next(rank)]
        start += rest
    return used


@pytest.mark.parametrize("start", [0, G, 7 * G, 10**15 * G])
@pytest.mark.parametrize(("world", "micro"), CUTS)
def test_the_order_is_the_same_at_every_world_size_and_accumulation(world, micro, start):
    expected = GlobalOrder(N, 7).samples(start, start + 8 * G).tolist()
    assert stream(world, micro, start, start + 8 * G) == expected


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 4), (2, 1), (4, 1), (2, 4)])
def test_a_pending_step_is_finished_with_the_samples_it_lacks(world, micro):
    start = 3 * G + 8
    expected = GlobalOrder(N, 7).samples(start, start + 8 + 2 * G).tolist()
    assert stream(world, micro, start, start + 8 + 2 * G) == expected


def test_a_pending_step_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="middle of an optimizer step"):
        MicroBatchSampler(GlobalOrder(N, 7), G, 8, start=4)


def test_each_key_knows_its_place():
    sampler = MicroBatchSampler(GlobalOrder(10, 0), 8, 2, rank=1, world_size=2, start=8)
    keys = next(iter(sampler))
    assert [(key.position, key.epoch) for key in keys] == [(12, 1), (13, 1)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_it_works_under_a_plain_data_loader(workers):
    sampler = MicroBatchSampler(GlobalOrder(N, 7), G, 4, start=G)
    loader = DataLoader(
        range(N), batch_sampler=sampler, num_workers=workers, generator=torch.Generator()
    )
    found = torch.cat(list(islice(loader, 8))).tolist()
    assert found == GlobalOrder(N, 7).samples(G, 3 * G).tolist()


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((0, 1, 0, 1), "global_batch_size"),
        ((4, 0, 0, 1), "micro_batch_size"),
        ((4, -2, 0, 1), "micro_batch_size"),
        ((4, 1, 0, 0), "world_size"),
        ((4, 1, 2, 2), "rank"),
        ((4, 3, 0, 1), "global_batch_size"),
        ((6, 2, 0, 2), "global_batch_size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(sizes, name):
    with pytest.raises(ConfigError) as caught:
        BatchShape(*sizes)
    assert caught.value.where == name


def test_a_start_before_the_beginning_is_refused():
    with pytest.raises(ConfigError, match="start"):
        MicroBatchSampler(GlobalOrder(N, 7), G, 4, start=-1)
