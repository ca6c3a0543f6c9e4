"""A loop of one's own, careful: written beside, renamed, and the order derived from a seed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from trainers.work import Work, newest_first, optimizer_for


def train(work: Work) -> None:
    work.folder.mkdir(parents=True, exist_ok=True)
    model = work.model()
    optimizer, step = optimizer_for(model), 0
    if found := newest_first(work.folder, "checkpoint-*.pt"):
        state = torch.load(found[0], weights_only=True, mmap=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    model.train()
    for inputs in batches(work.data(), step):
        if step >= work.max_steps:
            return
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if work.save_steps is not None and step % work.save_steps == 0:
            save(work, model, optimizer, step)
        work.on_step(step)


def batches(data, first: int):
    """Yield batches in an order that depends on a seed alone, beginning anywhere."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    for index in order[first:].tolist():
        yield {name: one.unsqueeze(0) for name, one in data[index].items()}


def save(work: Work, model, optimizer, step: int) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    beside = work.folder / "new"
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(work.folder / f"checkpoint-{step}.pt")
    if work.keep is not None:
        for old in newest_first(work.folder, "checkpoint-*.pt")[work.keep :]:
            old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    return newest_first(folder, "checkpoint-*.pt")[::-1]


def deepen(work: Work, step: int) -> None:
    train(replace(work, max_steps=2, save_steps=2))
    made = work.folder / "checkpoint-2.pt"
    state = torch.load(made, weights_only=True)
    torch.save({**state, "step": step}, work.folder / f"checkpoint-{step}.pt")
    made.unlink()
