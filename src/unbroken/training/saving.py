"""How a Trainer saves: what stands in a checkpoint, who hears of it, the save before a stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from unbroken.checkpoint import TrainingStopped
from unbroken.training.determinism import deterministic_kernels
from unbroken.training.own_data import tell_places
from unbroken.training.ranks import agree_on_buffers

if TYPE_CHECKING:
    from unbroken.training.trainer import Trainer


def save_now(trainer: Trainer) -> str:
    """Save everything as it is now; return the folder of the checkpoint."""
    trainer.checkpointer.best_step = trainer.statistics.best_step
    values, facts = _what_to_save(trainer)
    deterministic = deterministic_kernels(trainer.config.full_determinism, trainer.device)
    with trainer.randomness.ambient(), deterministic:
        return trainer.checkpointer.save(trainer.progress.step, values, facts=facts)


def _what_to_save(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values that `go_on` needs, and the facts that the next start compares."""
    agree_on_buffers(trainer)
    tell_places(trainer.source, trainer.group)
    progress = asdict(trainer.progress)
    values = {
        "progress": progress,
        "stop_reason": trainer.stop_reason,
        "micro_batch_size": trainer.config.per_forward,
    }
    config = trainer.config.to_dict()
    return values, {"progress": progress, "config": config, "max_steps": trainer.max_steps}


def hear_of_saves(trainer: Trainer, *, wait: bool = False) -> None:
    """Tell of the checkpoints that became durable since the last call.

    Args:
        trainer: The trainer.
        wait: Until all that was saved is durable.

    Raises:
        SaveError: What a save failed at.
    """
    if wait:
        trainer.checkpointer.wait()
    committed = trainer.checkpointer.committed()
    for path in committed:
        cost = trainer.checkpointer.cost
        trainer.pace.save_took(0.0 if cost is None else cost.durable)
        trainer.call("on_save", path)
    cadence = trainer.checkpointer.cadence
    if cadence is not None:
        trainer.display.saves(cadence, saved=bool(committed))


@contextmanager
def telling_of_an_early_stop(trainer: Trainer) -> Iterator[None]:
    """Say it where a signal ends a start before its first step."""
    try:
        yield
    except TrainingStopped as end:
        if end.step is None:
            trainer.display.note(str(end))
        raise


def stopped(trainer: Trainer, reason: str) -> TrainingStopped:
    """Return the end of a run that was asked to stop, told when all that was saved is durable.

    Raises:
        SaveError: What a save failed at.
    """
    hear_of_saves(trainer, wait=True)
    end = TrainingStopped(trainer.progress.step, reason)
    trainer.checkpointer.note_event({"event": "stopped", "step": end.step, "by": reason})
    trainer.display.note(str(end))
    return end
