"""Data sets and loaders that draw from every global generator, and how they are read in tests."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from unbroken.data import BatchSource, MicroBatch, batch_source


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(),
        np.random.rand(),
        np.random.randn(),
        float(torch.rand(())),
    ]


class NoisyDataset(Dataset):
    """Each sample is its index and five draws."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, *draws()], dtype=torch.float64)


class NoisyStream(IterableDataset):
    """Samples from an iterator, in an order and with noise from the global generators."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self):
        for index in torch.randperm(self.n).tolist():
            yield torch.tensor([index, *draws()], dtype=torch.float64)


class StatefulLoader:
    """Batches with a state of its own, which runs one batch ahead of what it gave out."""

    def __init__(self, n: int, size: int) -> None:
        self.n, self.size, self.epoch, self.given = n, size, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        while self.given < self.n:
            batch = torch.arange(self.given, min(self.given + self.size, self.n))
            self.given += len(batch)
            yield batch + 1000 * self.epoch + float(torch.rand(()))
        self.given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def source_of(data, *, size: int = 8, micro: int = 4, seed: int = 42, **options) -> BatchSource:
    return batch_source(data, seed=seed, global_batch_size=size, micro_batch_size=micro, **options)


def read(source: BatchSource, count: int) -> list[MicroBatch]:
    """The next micro-batches from the source's position on, all used."""
    batches = list(islice(source.iterate(), count))
    for micro in batches:
        source.used(micro)
    source.close()
    return batches


def bytes_of(batches: list[MicroBatch]) -> bytes:
    return b"".join(micro.data.numpy().tobytes() for micro in batches)
