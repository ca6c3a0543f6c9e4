"""Data sets, collators and a sampler for runs of the host's Trainer: windows of a real text."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import torch

from unbroken.language_model import ByteTokenizer, TokenDataset, builtin_text

BLOCK = 16
SAMPLES = 48


class Text(torch.utils.data.Dataset):
    """Windows of a real text, and the indices that were read."""

    def __init__(self, cache: str, samples: int = SAMPLES, changed: bool = False) -> None:
        tokens = TokenDataset.from_files(
            builtin_text(), block_size=BLOCK, cache=cache, tokenizer=ByteTokenizer()
        )
        start = 100 if changed else 0
        self.rows = [tokens[i]["input_ids"] for i in range(start, start + samples)]
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        self.read.append(int(index))
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Augmented(Text):
    """Replaces bytes at random, from all three global generators."""

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index].clone()
        row[random.randrange(BLOCK)] = np.random.randint(256)
        row[int(torch.randint(BLOCK, ()))] = 32
        return {"input_ids": row, "labels": row}


class Noisy(Text):
    """Replaces bytes at random, from a generator of its own that nobody can key."""

    noise = random.Random(7)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index].clone()
        row[:] = torch.tensor([self.noise.randrange(256) for _ in range(BLOCK)])
        return {"input_ids": row, "labels": row}


class Ragged(Text):
    def __getitem__(self, index: int) -> dict:
        row = self.rows[index][: 4 + (index * 7) % 12]
        return {"input_ids": row, "labels": row}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: Text, shuffled: bool) -> None:
        self.rows, self.shuffled = rows, shuffled

    def __iter__(self):
        order = torch.randperm(len(self.rows)) if self.shuffled else range(len(self.rows))
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.rows[int(i)] for i in list(order)[first::step])


class OwnOrder(Stream):
    """A stream in the order of a generator in the object."""

    def __init__(self, rows: Text, shuffled: bool) -> None:
        super().__init__(rows, shuffled)
        self.rng = random.Random(4)

    def __iter__(self):
        return (self.rows[i] for i in self.rng.sample(range(len(self.rows)), len(self.rows)))


class StreamWithState(Stream):
    """A stream that brings itself to its place, and notes what it has read."""

    def __init__(self, rows: Text, shuffled: bool) -> None:
        super().__init__(rows, shuffled)
        self.order: list[int] = []
        self.next = 0

    @property
    def read(self) -> list[int]:
        return self.rows.read

    def state_dict(self) -> dict:
        return {"order": self.order, "next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.next = state["order"], state["next"]

    def __iter__(self):
        if self.next in (0, len(self.rows)):
            self.order, self.next = torch.randperm(len(self.rows)).tolist(), 0
        while self.next < len(self.rows):
            self.next += 1
            yield self.rows[self.order[self.next - 1]]


def masked(samples: list[dict]) -> dict:
    ids = torch.stack([sample["input_ids"] for sample in samples])
    return {"input_ids": torch.where(torch.rand(ids.shape) < 0.15, 0, ids), "labels": ids}


def padded(samples: list[dict]) -> dict:
    rows = [
        torch.nn.functional.pad(s["input_ids"], (0, BLOCK - len(s["input_ids"]))) for s in samples
    ]
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


class OfARank:
    """Makes batches, and knows its rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, samples: list[dict]) -> dict:
        rows = torch.stack([sample["input_ids"] for sample in samples])
        return {"input_ids": rows, "labels": (rows + self.rank) % 256}


class CountingSampler(torch.utils.data.Sampler):
    """Another order in each of its own passes."""

    def __init__(self, length: int) -> None:
        self.length, self.passes = length, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        self.passes += 1
        return iter(random.Random(self.passes).sample(range(self.length), self.length))


class OfTheProcess(CountingSampler):
    """Another order in each process."""

    def __iter__(self):
        return iter(random.Random(os.getpid()).sample(range(self.length), self.length))


class OfTheProcessOnRank1(CountingSampler):
    """Another order in each process of rank 1, where the other ranks draw the same in each pass."""

    def __iter__(self):
        seed = os.getpid() if os.environ.get("RANK") == "1" else 1
        return iter(random.Random(seed).sample(range(self.length), self.length))


class OfAWrongLength(CountingSampler):
    """Says that it gives each sample once, and gives fewer or more, in another order each time."""

    def __init__(self, length: int, given: int, draws: str) -> None:
        super().__init__(length)
        self.given, self.draws = given, draws
        self.own = random.Random(3)

    def __iter__(self):
        if self.draws == "global":
            for _ in range(self.given):
                yield int(torch.randint(self.length, ()))
        elif self.draws == "own":
            for _ in range(self.given):
                yield self.own.randrange(self.length)
        elif self.draws == "first":
            self.passes += 1
            yield from random.Random(self.passes).choices(range(self.length), k=self.given)
        else:
            yield from random.Random(self.passes).choices(range(self.length), k=self.given)
            self.passes += 1


class ListsOfAWrongLength(OfAWrongLength):
    """The same, in lists."""

    def __len__(self) -> int:
        return self.length // 4

    def __iter__(self):
        return iter(torch.utils.data.BatchSampler(super().__iter__(), 4, drop_last=False))


class BatchesOfAWrongLength(OfAWrongLength):
    """The same, with no loader."""

    def __init__(self, rows, collate, given: int, draws: str) -> None:
        super().__init__(len(rows), given, draws)
        self.rows, self.collate = rows, collate

    def __len__(self) -> int:
        return self.length // 4

    def __iter__(self):
        for indices in torch.utils.data.BatchSampler(super().__iter__(), 4, drop_last=False):
            yield self.collate([self.rows[index] for index in indices])


class LossWeighted(CountingSampler):
    """Draws by weights that differ from start to start, as if training had made them."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.weights = torch.ones(length)
        self.weights[0] += os.getpid() % 1000

    def __iter__(self):
        return iter(torch.multinomial(self.weights, self.length).tolist())


class OwnSampler(torch.utils.data.Sampler):
    """Another order in each epoch, if it is told the epoch."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(100 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class UnevenBatches(torch.utils.data.Sampler):
    """Lists of 2, 4, 6, ... indices, in another order in each epoch."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length // 4

    def __iter__(self):
        order = torch.randperm(self.length).tolist()
        while order:
            size = min(2 if len(order) % 8 == 0 else 6, len(order))
            yield order[:size]
            order = order[size:]


class Batches:
    """Batches of no DataLoader, shuffled by a generator of its own or by the global one."""

    def __init__(self, rows, collate, generator=None) -> None:
        self.rows, self.collate, self.generator = rows, collate, generator

    def __len__(self) -> int:
        return len(self.rows) // 4

    def __iter__(self):
        order = torch.randperm(len(self.rows), generator=self.generator).tolist()
        for at in range(0, len(order), 4):
            yield self.collate([self.rows[index] for index in order[at : at + 4]])


class Wrapped:
    """What another makes, with a look at each batch."""

    def __init__(self, inner) -> None:
        self.inner, self.seen = inner, 0

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self):
        for batch in self.inner:
            self.seen += 1
            yield batch


def own_loader(trainer, kind: str, stock):
    """Return the training loader of a subclass, of which only "wrapped" asks the host for one."""
    rows, collate = trainer.train_dataset, trainer.data_collator
    options = {"collate_fn": collate, "num_workers": trainer.args.dataloader_num_workers}
    if kind == "wrapped":
        return Wrapped(stock())
    if kind.startswith("lists of "):
        given, draws = kind[9:].split()
        lists = ListsOfAWrongLength(len(rows), int(given), draws)
        return torch.utils.data.DataLoader(rows, batch_sampler=lists, **options)
    if kind.startswith("no loader of "):
        given, draws = kind[13:].split()
        return BatchesOfAWrongLength(rows, collate, int(given), draws)
    if kind == "uneven":
        return torch.utils.data.DataLoader(rows, batch_sampler=UnevenBatches(len(rows)), **options)
    if kind.startswith("of "):
        return torch.utils.data.DataLoader(rows, batch_size=int(kind[3:]), shuffle=True, **options)
    own = {
        "batches": lambda: None,
        "batches with a generator": lambda: torch.Generator().manual_seed(1),
        "batches of the hour": lambda: torch.Generator().manual_seed(time.time_ns()),
    }
    if kind in own:
        return Batches(rows, collate, own[kind]())
    if kind == "a list":
        return [collate([rows[i + k] for k in range(4)]) for i in range(0, len(rows), 4)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, **options)
    return trainer.accelerator.prepare(loader) if kind == "prepared" else loader
