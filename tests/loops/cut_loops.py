"""Loops of each kind, which are killed at a place of theirs, as functions for fresh processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fresh import run_fresh
from loops.scripts_of_loops import Noisy, Run
from unbroken import Checkpointer

At = Callable[[str], None]  # told of each place that the loop comes to


def scaled(folder: Path, at: At) -> Any:
    """Skip steps 1, 3 and 4, whose losses are infinite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    run = Run(folder, scaler=scaler, data=Noisy(10), save_steps=1)
    for batch in run.run.steps(6, batch_size=4):
        factor = float("inf") if run.run.step in (0, 2, 3) else 1.0
        scaler.scale(run.model(batch).square().mean() * factor).backward()
        scaler.step(run.optimizer)
        at("stepped")
        scaler.update()
        at("updated")
        run.optimizer.zero_grad()
        run.run.log(scale=scaler.get_scale())
    return run, scaler.state_dict()


def epochs(folder: Path, at: At) -> Any:
    """Draw at random before the batches, between them and behind them."""
    run = Run(folder, data=Noisy(12), save_steps=1)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
    run.run.register(scheduler=scheduler)
    run.run.state.best = 1e9
    for epoch in run.run.epochs(2, batch_size=4):
        at(f"before the batches of {epoch}")
        run.run.state.total = torch.rand(1)
        for number, batch in enumerate(run.run.batches()):
            run.train(batch)
            run.run.state.total += torch.rand(1)
            at(f"batch {number} of {epoch}")
        run.model.eval()
        at(f"validation of {epoch}")
        with torch.no_grad():
            loss = run.model(torch.rand(1, 4)).item()
        run.model.train()
        run.run.state.best = min(run.run.state.best, loss)
        scheduler.step()
        run.run.log(loss=loss, **run.run.state)
        at(f"edge of {epoch}")
    return run, dict(run.run.state), scheduler.state_dict()


def without_an_optimizer(folder: Path, at: At) -> Any:
    """Gather experience, as reinforcement learning does: no data, and no optimizer."""
    seen, generator = torch.zeros(3), torch.Generator().manual_seed(3)
    run = Checkpointer(folder, seen=seen, generator=generator, save_steps=1, tell=None)
    for number in run.steps(6):
        seen += torch.rand(3, generator=generator) * number + torch.rand(3)
        at("turn")
    return run.step, seen.tolist()


def two_optimizers(folder: Path, at: At) -> Any:
    """Take a step of each in a turn of two micro-batches."""
    run = Run(folder, data=Noisy(10), save_steps=1)
    other = nn.Linear(4, 4)
    second = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    run.run.register(other=other, second=second)
    for batches in run.run.steps(5, batch_size=2, accumulate=2):
        for batch in batches:
            other(batch).square().mean().backward()
        second.step()
        second.zero_grad()
        at("between the two")
        run.train(*batches)
        at("turn")
    return run, [one.tolist() for one in other.parameters()]


def compiled(folder: Path, at: At) -> Any:
    """Take steps that torch.compile has traced, whose hooks run no Python of their own."""
    run = Run(folder, data=Noisy(10), save_steps=1)
    step = torch.compile(run.optimizer.step, backend="eager")
    for number, batch in enumerate(run.run.steps(3, batch_size=4), run.run.step + 1):
        run.model(batch).square().mean().backward()
        step()
        run.optimizer.zero_grad()
        if run.run.step != number:
            raise SystemExit(f"step {number} did not count")
        at("turn")
    return (run,)


KINDS = (scaled, epochs, without_an_optimizer, two_optimizers, compiled)
LOOPS = {one.__name__: one for one in KINDS}


def loop_here(folder: str, loop: str, place: str, turn: int) -> None:
    """Run a loop; be killed where it comes to a place for the n-th time in this start."""
    torch.set_num_threads(1)
    left = [turn]

    def at(found: str) -> None:
        left[0] -= found == place
        if found == place and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.manual_seed(1)
    found = LOOPS[loop](Path(folder) / "run", at)
    run, *rest = found
    bits = [run.run.step, run.bits, torch.get_rng_state().tolist()] if isinstance(run, Run) else run
    metrics = Path(folder, "run", "metrics.jsonl")
    lines = metrics.read_text() if metrics.exists() else ""
    Path(folder, "bits").write_text(repr([bits, rest, lines]))


def ended(folder: Path, loop: str, place: str = "", turn: int = 0, kills: int = 0) -> str:
    """Run a loop, killed so often; return all bits that it ends with."""
    folder.mkdir(exist_ok=True)
    for _ in range(kills):
        assert run_fresh(loop_here, str(folder), loop, place, turn) == -signal.SIGKILL
    assert run_fresh(loop_here, str(folder), loop, "", 0) == 0
    return (folder / "bits").read_text()
