"""A hand-written loop that is killed, and resumes with a number that nobody saved."""

from __future__ import annotations

import os
import signal
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fresh import run_fresh
from small_trainers import small_trainer
from unbroken import Checkpointer, ResumePolicy
from unbroken.data import batch_source
from unbroken.distributed import join
from unbroken.training import Callback

SAVE_STEPS, END = 4, 20


@dataclass(frozen=True)
class Loop:
    """One start of the loop.

    Attributes:
        kill_after: The step after which it kills itself; None: it goes on to its end.
        temperature: What the loss is divided by: no checkpoint holds it, no fact tells of it.
        from_step: The first step that has this temperature; those before have 1.
        policy: What a resume accepts.
    """

    kill_after: int | None = None
    temperature: float = 1.0
    from_step: int = 0
    policy: ResumePolicy | None = None

    def run(self, folder: str) -> None:
        """Train in this process; what is told goes to a file beside the folder."""
        with Path(f"{folder}.out").open("a", buffering=1) as out, redirect_stdout(out):
            self._train(folder)

    def _train(self, folder: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.1), nn.Linear(16, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        samples = [(torch.randn(6), torch.tensor(i % 2)) for i in range(40)]
        data = batch_source(samples, global_batch_size=8, seed=1)
        objects = {"model": model, "optimizer": optimizer, "data": data}
        run = Checkpointer(folder, save_steps=SAVE_STEPS, resume=self.policy, **objects)
        step = run.resume().step
        for batch in data.iterate():
            x, y = batch.data
            divisor = self.temperature if step >= self.from_step else 1.0
            nn.functional.cross_entropy(model(x) / divisor, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            data.used(batch)
            step += 1
            run.save_if_due(step)
            if step == self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == END:
                break
        run.close()


def run_starts(folder: Path, *starts: Loop) -> tuple[list[int], list[str]]:
    """Run starts, each in a fresh process; return their statuses, and all that was told."""
    statuses = [run_fresh(one.run, str(folder)) for one in starts]
    return statuses, Path(f"{folder}.out").read_text().splitlines()


def train_on_a_rank(temperature: float, folder: str, kill_after: int | None, exact: str) -> None:
    """Train a replica of a model on this rank; nothing adds gradients but the save compares.

    Args:
        temperature: What this rank divides its loss by, with a factor of 0: weights stay equal.
        folder: The run directory.
        kill_after: The step after which all ranks kill themselves; None: none does.
        exact: As `ResumePolicy(exact_resume=...)`.
    """
    out = f"{folder}.out{os.environ['RANK']}"
    with Path(out).open("a", buffering=1) as stream, redirect_stdout(stream):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        policy = ResumePolicy(exact_resume=exact)
        run = Checkpointer(
            folder, save_steps=4, resume=policy, ranks=join(), model=model, optimizer=optimizer
        )
        step = run.resume().step
        while step < END:
            optimizer.zero_grad()
            (model(torch.ones(1, 6)).sum() / temperature).backward()
            optimizer.step()
            step += 1
            run.save_if_due(step)
            if step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
        run.close()


@dataclass(frozen=True)
class LoopOnRanks:
    """A loop over data whose samples are shared among the ranks; weights stay as they are.

    Attributes:
        kill_after: The step after which all ranks kill themselves; None: none does.
        lost: How many samples a resume is ahead of its place.
        micro: Samples of a micro-batch.
        noisy: Whether the collator draws.
        save_steps: As that of a Checkpointer.
    """

    kill_after: int | None = None
    lost: int = 0
    micro: int = 2
    noisy: bool = False
    save_steps: int = 4

    def run(self, folder: str) -> None:
        """Train on this rank; what is told goes to a file beside the folder."""
        with Path(f"{folder}.out").open("a", buffering=1) as out, redirect_stdout(out):
            self._train(folder, join())

    def _train(self, folder: str, group) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        ranks = {"rank": group.rank, "world_size": group.world_size}
        collate = {"collate_fn": with_noise} if self.noisy else {}
        data = batch_source(
            torch.randn(80, 6),
            global_batch_size=4,
            micro_batch_size=self.micro,
            seed=1,
            **ranks,
            **collate,
        )
        objects = {"model": model, "optimizer": optimizer, "data": data}
        run = Checkpointer(folder, save_steps=self.save_steps, ranks=group, **objects)
        step = run.resume().step
        if step:
            data.position = replace(data.position, samples=data.position.samples + self.lost)
        batches = data.iterate()
        while step < END:
            for _ in range(4 // self.micro // group.world_size):
                batch = next(batches)
                model(batch.data).sum().backward()
                data.used(batch)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            run.save_if_due(step)
            if step == self.kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
        run.close()


def with_noise(samples: list[torch.Tensor]) -> torch.Tensor:
    """Return a batch with noise that follows the batch."""
    return torch.stack(samples) + torch.randn(len(samples), 6)


@dataclass(frozen=True)
class TrainerOnRanks:
    """A Trainer on ranks.

    Attributes:
        kill_after: The step after which all ranks kill themselves; None: none does.
        learning_rate: That of the run from here on.
    """

    kill_after: int | None = None
    learning_rate: float = 0.01

    def run(self, folder: str) -> None:
        """Train on this rank; what rank 0 finds goes to a file beside the folder."""
        more = {"callbacks": [KillAfter(self.kill_after)], "group": join()}
        settings = {"learning_rate": self.learning_rate, "allow": ["learning_rate"]}
        sizes = {"batch_size": 4, "micro_batch_size": 2}
        small_trainer(folder, trainer=more, max_steps=8, save_steps=4, **settings, **sizes).train()


@dataclass
class KillAfter(Callback):
    """Kills its process after a step."""

    step: int | None

    def on_step_end(self, trainer) -> None:
        """Kill this process, if it is time."""
        if trainer.progress.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
