"""In a loop of one's own on several ranks, each rank's loader comes back to its own place."""

from __future__ import annotations

import os
import random
import sys
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from distributed.ranks import run_ranks
from unbroken import Checkpointer, batch_source
from unbroken.distributed import join

STEPS, CUT = 9, 7  # an epoch has six batches on each rank


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), float(torch.rand(()))])


def dealt(rank: int) -> DataLoader:
    data = Numbers()
    return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, rank))


def prepared(**options):
    def make(rank: int):
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration

        config = DataLoaderConfiguration(**options)
        loader = DataLoader(Numbers(), batch_size=4, shuffle=True)
        return Accelerator(cpu=True, dataloader_config=config).prepare(loader)

    return make


LOADERS = {
    "dealt": dealt,
    "prepared": prepared(),
    "prepared, by seed and epoch": prepared(use_seedable_sampler=True),
    "dispatched": prepared(dispatch_batches=True),
}


def scatter(start: int) -> None:
    torch.manual_seed(start), random.seed(start), np.random.seed(start)


def go(group, name: str, folder: str, steps: int) -> list[torch.Tensor]:
    """Go on with a run of this loader to a step, and save; return the batches."""
    scatter(steps + group.rank)
    loader = LOADERS[name](group.rank)
    sizes = {"global_batch_size": 8, "micro_batch_size": 4, "world_size": 2}
    source = batch_source(loader, seed=0, rank=group.rank, **sizes)
    found = []
    with Checkpointer(folder, ranks=group, data=source) as checkpointer:
        step = checkpointer.resume().step
        for micro in islice(source.iterate(), steps - step):
            source.used(micro)
            found.append(micro.data)
        source.close()
        checkpointer.save(steps)
    return found


def on_a_rank(folder: str, names: list[str]) -> None:
    """Compare, for each loader, a run that was cut with one that was not."""
    warnings.simplefilter("ignore")
    group, wrong = join(), []
    for name in names:
        where = Path(folder) / name.replace(" ", "-")
        whole = go(group, name, str(where / "whole"), STEPS)
        cut = go(group, name, str(where / "cut"), CUT)
        cut += go(group, name, str(where / "cut"), STEPS)
        if not all(map(torch.equal, whole, cut)) or len(cut) != STEPS:
            wrong.append(name)
    sys.stderr.write(f"{wrong}\n" if wrong else "")
    os._exit(3 if wrong else 0)


FEW, MORE = ["dealt", "dispatched"], ["prepared", "prepared, by seed and epoch"]


@pytest.mark.parametrize("names", [FEW, pytest.param(MORE, marks=pytest.mark.sweep)])
def test_each_ranks_loader_comes_back_to_its_place_in_a_loop_of_ones_own(names, tmp_path):
    assert run_ranks(on_a_rank, str(tmp_path), names) == [0, 0]
