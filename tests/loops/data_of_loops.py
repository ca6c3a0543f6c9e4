"""Data of each kind that people give to a loop, and processes that train on them and are killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from fresh import run_fresh
from loops.scripts_of_loops import Noisy, Run
from unbroken.errors import DataError

STEPS = 4  # an epoch has two or three


class Stream(IterableDataset):
    """Samples in a row, dealt to the workers, each drawn anew."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in range(first, 10, step):
            yield torch.full((4,), float(number)) + torch.randn(4) / 8


class StreamWithState(Stream):
    """Knows its place, as a stream that StatefulDataLoader asks for it."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(self.place, 10):
            self.place = number + 1
            yield torch.full((4,), float(number))
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Shards:
    """Stages one over the other, as WebDataset has: shards, samples, a shuffle buffer, batches."""

    def __init__(self) -> None:
        self.random = random.Random(3)

    def samples(self) -> Iterator[torch.Tensor]:
        for shard in self.random.sample(range(4), 4):
            yield from (torch.full((4,), float(8 * shard + n)) for n in range(3))

    def shuffled(self) -> Iterator[torch.Tensor]:
        held: list[torch.Tensor] = []
        for sample in self.samples():
            held.append(sample)
            if len(held) > 3:
                yield held.pop(self.random.randrange(len(held)))
        yield from held

    def __iter__(self) -> Iterator[torch.Tensor]:
        batch: list[torch.Tensor] = []
        for sample in self.shuffled():
            batch.append(sample)
            if len(batch) == 4:
                yield torch.stack(batch) + random.random() / 8
                batch = []


class Columns:
    """The interface of a `datasets.Dataset`: rows as mappings, also of several indices at once."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((4,), float(index)) + torch.randn(4) / 8}

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [self[index] for index in indices]


_PASSES = itertools.count()  # over what `forgetful` gives, in this process


def forgetful() -> Iterator[torch.Tensor]:
    """Read what nothing saves: the negative control."""
    passes = next(_PASSES)
    yield from (torch.full((4, 4), float(number + 3 * passes)) for number in range(3))


def few() -> Noisy:
    return Noisy(10)


def loader(data: Any, kind: Any = DataLoader, **options: Any) -> Callable[[], Any]:
    return lambda: kind(data(), batch_size=4, **options)


def shuffled(kind: Any = DataLoader, **options: Any) -> Callable[[], Any]:
    return loader(few, kind, shuffle=True, **options)


KINDS: dict[str, tuple[Callable[[], Any], int | None]] = {
    "map style": (few, 4),
    "columns": (Columns, 4),
    "loader": (shuffled(), None),
    "loader, 2 workers": (shuffled(num_workers=2), None),
    "stateful loader": (shuffled(StatefulDataLoader), None),
    "stateful loader, 2 workers": (shuffled(StatefulDataLoader, num_workers=2), None),
    "stateful loader of a stream": (loader(StreamWithState, StatefulDataLoader), None),
    "stream": (Stream, 4),
    "loader of a stream": (loader(Stream), None),
    "loader of a stream, 2 workers": (loader(Stream, num_workers=2), None),
    "shards": (Shards, None),
    "function": (lambda: lambda: iter(Shards()), None),
    "forgetful": (lambda: forgetful, None),
}


def batch_of(given: Any) -> torch.Tensor:
    return given["x"] if isinstance(given, dict) else given


def in_steps(run: Run, size: int | None, sees: Callable[[], None]) -> None:
    for batch in run.run.steps(STEPS, batch_size=size):
        run.train(batch_of(batch))
        sees()


def in_epochs(run: Run, size: int | None, sees: Callable[[], None]) -> None:
    for _ in run.run.epochs(2, batch_size=size):
        for batch in run.run.batches():
            run.train(batch_of(batch))
            sees()


LOOPS = {"steps": in_steps, "epochs": in_epochs}


def train_here(folder: str, kind: str, loop: str, kill_at: int) -> None:
    """Run a loop; be killed in the turn of this start with that number, after its step."""
    multiprocessing.set_start_method("fork", force=True)  # of the workers
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata's own call
    torch.set_num_threads(1)
    random.seed(0)
    make, size = KINDS[kind]
    turns = itertools.count(1)

    def sees() -> None:
        if next(turns) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(1)
    run = Run(Path(folder) / "run", data=make(), save_steps=1)
    try:
        LOOPS[loop](run, size, sees)
    except DataError as error:
        run.told.append(str(error))
        raise SystemExit(1) from error
    finally:
        (Path(folder) / "told").write_text("\n".join(run.told))
    (Path(folder) / "bits").write_text(repr([run.run.step, run.bits]))


def killed(folder: Path, kind: str, loop: str, times: int) -> None:
    """Train; be killed after the step behind the first save of each start: at each cut in a row."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(times):
        assert run_fresh(train_here, str(folder), kind, loop, 2) == -signal.SIGKILL


def ended(folder: Path, kind: str, loop: str, kills: int = 0) -> tuple[str, str]:
    """Train, killed so often; return the bits and what is told."""
    killed(folder, kind, loop, kills)
    assert run_fresh(train_here, str(folder), kind, loop, 0) == 0
    return (folder / "bits").read_text(), (folder / "told").read_text()
