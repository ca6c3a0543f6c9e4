"""Which samples each rank uses, step by step, for many ways to cut the same steps."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import IterableDataset

from unbroken.distributed import Group, RankSums, join
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

SAMPLES, BATCH, STEPS = 44, 16, 8
WORLDS, WORKERS, ACCUMULATIONS = (1, 2, 4), (0, 2), (1, 2, 4)


class Numbers:
    """Sample i is the number i."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        return torch.tensor([index / SAMPLES]), torch.tensor(index)


class Stream(IterableDataset):
    """The same numbers, one after the other."""

    def __iter__(self):
        yield from (Numbers()[index] for index in range(SAMPLES))


class Used(Callback):
    """Writes down what this rank has used in each step."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = folder / f"used-{rank}"
        self.samples: list[int] = []

    def loss(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.samples += labels.tolist()
        return outputs.square().mean()

    def on_step_end(self, trainer) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps([trainer.progress.step, self.samples]) + "\n")
        self.samples.clear()


def use(folder: Path, group: Group, workers: int, accumulation: int, data: str, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    used = Used(folder, group.rank)
    config = TrainerConfig(
        output_dir=str(folder / "run"),
        batch_size=BATCH,
        micro_batch_size=BATCH // accumulation // group.world_size,
        max_steps=steps,
        lr_scheduler_type="constant",
        dataloader_num_workers=workers,
        logging_steps=1,
        save_steps=3,
    )
    Trainer(
        nn.Linear(1, 1),
        config,
        Numbers() if data == "map" else Stream(),
        callbacks=[used],
        loss_fn=used.loss,
        display=NoDisplay(),
        group=group,
    ).train()


def use_in_all_ways(where: str) -> None:
    """Use the data in every way that there is for this number of ranks."""
    group = join(timeout=60.0)
    for workers, accumulation in product(WORKERS, ACCUMULATIONS):
        folder = Path(where, f"map-{group.world_size}-{workers}-{accumulation}")
        use(folder, group, workers, accumulation, "map", STEPS)
    for accumulation in ACCUMULATIONS:
        folder = Path(where, f"stream-{group.world_size}-0-{accumulation}")
        use(folder, group, 0, accumulation, "stream", STEPS)
    group.close()
    os._exit(0)


def go_on(where: str, data: str, steps: int) -> None:
    """Use the data on, up to a step, in one way."""
    group = join(timeout=60.0)
    folder = Path(where, f"{data}-{group.world_size}")
    folder.mkdir(exist_ok=True)
    run = Path(where, "run")
    if group.rank == 0 and run.exists():
        run.rename(folder / "run")
    group.gather("moved", None)
    use(folder, group, 0, 2, data, steps)
    group.gather("used", None)
    if group.rank == 0:
        (folder / "run").rename(run)
    group.close()
    os._exit(0)


def used_by_all(folder: Path, world_size: int) -> dict[int, list[int]]:
    """Return the samples of each step, in the order of the ranks."""
    files = [(folder / f"used-{rank}").read_text().splitlines() for rank in range(world_size)]
    steps = [dict(map(json.loads, lines)) for lines in files]
    return {step: [one for rank in steps for one in rank[step]] for step in steps[0]}


def sum_over_ranks(folder: str, parts: list[float]) -> None:
    """Sum each rank's number over all ranks, at many places; write down the distinct sums."""
    group = join(timeout=30.0)
    sums = RankSums(group)
    for numel in (group.world_size, 1000):
        sums.begin(torch.full((sums.padded(numel),), parts[group.rank]))
    found = sorted({value.hex() for one in sums.finish() for value in one.tolist()})
    Path(folder, str(group.rank)).write_text(" ".join(found))
    group.close()
