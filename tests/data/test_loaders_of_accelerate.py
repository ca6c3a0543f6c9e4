"""Loaders that an Accelerator has prepared come back to their place exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

from data.data_sets import NoisyDataset, NoisyStream, bytes_of, read, source_of
from unbroken import Checkpointer
from unbroken.data import CountedSource

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*")

KINDS = {
    "by default": {},
    "a sampler by seed and epoch": {"use_seedable_sampler": True},
    "dispatched": {"dispatch_batches": True},
    "stateful": {"use_stateful_dataloader": True},
}
LOADERS = {
    "shuffled": lambda: DataLoader(NoisyDataset(22), batch_size=4, shuffle=True),
    "in order": lambda: DataLoader(NoisyDataset(22), batch_size=4),
    "a stream": lambda: DataLoader(NoisyStream(22), batch_size=4),
}


def prepared(kind: str, name: str):
    if kind == "stateful":
        pytest.importorskip("torchdata")
    config = DataLoaderConfiguration(**KINDS[kind])
    return Accelerator(cpu=True, dataloader_config=config).prepare(LOADERS[name]())


def scatter(start: int) -> None:
    torch.manual_seed(start), random.seed(start), np.random.seed(start)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_loader_continues_exactly_at_any_batch(kind, name):
    whole = bytes_of(read(source_of(prepared(kind, name)), 14))
    for used in (1, 6, 8):  # an epoch has six batches
        scatter(used)
        first = source_of(prepared(kind, name))
        head = read(first, used)
        scatter(-used & 0xFF)
        again = source_of(prepared(kind, name))
        again.load_state_dict(first.state_dict())
        assert bytes_of(head) + bytes_of(read(again, 14 - used)) == whole
        assert isinstance(again, CountedSource)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_loader_of_a_checkpointer_goes_on_exactly(kind, tmp_path):
    found = []
    for steps in (7, 9):
        scatter(steps)
        source = source_of(prepared(kind, "shuffled"), size=4)
        with Checkpointer(tmp_path, data=source) as checkpointer:
            report = checkpointer.resume()
            found += read(source, steps - report.step)
            checkpointer.save(steps)
    assert report.verdict == "exact"
    assert bytes_of(found) == bytes_of(read(source_of(prepared(kind, "shuffled"), size=4), 9))
