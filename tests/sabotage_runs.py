"""Resumes that leave out one part of what makes a run, and when its loss must show.

They are the negative controls: a comparison that does not notice them would notice nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from unbroken.checkpoint import ResumeReport
from unbroken.checkpoint.resume import resume
from unbroken.training import Progress, Trainer

if TYPE_CHECKING:
    from scenarios import Cut, Scenario


def parts_that_matter(scenario: Scenario, cut: Cut) -> list[str]:
    """Return the parts of a scenario without which a resume after this cut must show.

    After every cut at least one step is still to be taken. So:

    - What is derived (an order, a key) shows wherever the scenario makes use of it.
    - The ambient generators show always: they are seeded as a run begins, and nothing in a new
      process has done so. Nothing here draws from them; they stand in the last checkpoint.
    - All else has in a new process what it has in checkpoint-0: there is nothing to lose before
      the first step. After it each part holds a count, a sum or a chain that began with the run
      and never returns to where it began, so a resume that begins it anew ends elsewhere.
    - One such count does return: an overflow sets the scaler's good steps to 0. It is BatchNorm
      whose gradients overflow here.
    - Lines of metrics stand twice where steps were logged that are taken again.

    The gradients of an unfinished window are no part of a checkpoint between two steps; see
    resume/test_whole_state.py.
    """
    has_moved = cut.checkpoint > 0
    has_norm = scenario.model == "batchnorm"
    matters = {
        "model": has_moved,
        "buffers": has_moved and has_norm,
        "optimizer": has_moved,
        "scheduler": has_moved,
        "scaler": has_moved and scenario.precision == "fp16" and not has_norm,
        "data": has_moved,
        "progress": has_moved,
        "statistics": has_moved,
        "end of the metrics": cut.logged > cut.checkpoint,
        "random generators": True,
        "order of the data": scenario.shuffle,
        "keys of the samples": scenario.augmentation or scenario.random_collator,
        "keys of the forward passes": not has_norm,  # the other models have dropout
    }
    return [part for part, is_so in matters.items() if is_so]


def leave_out(trainer: Trainer, part: str) -> None:
    """Make the resume to come leave out one part: it is what it is in a new process."""
    _LEAVE_OUT[part](trainer)


def _after_resume(trainer: Trainer, forget: Callable[[], object]) -> None:
    load = trainer.checkpointer.resume

    def resume(which: object, **more: object) -> ResumeReport:
        report = load(which, **more)
        forget()
        return report

    trainer.checkpointer.resume = resume


def _object(name: str, trainer: Trainer) -> None:
    owner = trainer.checkpointer.objects[name]
    fresh = copy.deepcopy(owner.state_dict())
    _after_resume(trainer, lambda: owner.load_state_dict(fresh))


def _buffers(trainer: Trainer) -> None:
    fresh = {name: value.clone() for name, value in trainer.model.named_buffers()}
    _after_resume(trainer, lambda: trainer.model.load_state_dict(fresh, strict=False))


def _progress(trainer: Trainer) -> None:
    fresh = asdict(Progress())
    _after_resume(trainer, lambda: trainer.checkpointer.values.update(progress=fresh))


def _end_of_the_metrics(trainer: Trainer) -> None:
    resume._RunStart._cut_metrics = lambda *_, **__: ()


def _random_generators(trainer: Trainer) -> None:
    resume.restore_rng = lambda tree: None


def _order_of_the_data(trainer: Trainer) -> None:
    trainer.source.order._block = lambda epoch, begin, end: np.arange(begin, end)


def _keys_of_the_samples(trainer: Trainer) -> None:
    trainer.source._batches.seed += 1


def _keys_of_the_forward_passes(trainer: Trainer) -> None:
    trainer._step_runner._seed += 1


_OBJECTS = ("model", "optimizer", "scheduler", "scaler", "data", "statistics")
_LEAVE_OUT: dict[str, Callable[[Trainer], None]] = {
    **{name: partial(_object, name) for name in _OBJECTS},
    "buffers": _buffers,
    "progress": _progress,
    "end of the metrics": _end_of_the_metrics,
    "random generators": _random_generators,
    "order of the data": _order_of_the_data,
    "keys of the samples": _keys_of_the_samples,
    "keys of the forward passes": _keys_of_the_forward_passes,
}
PARTS = tuple(_LEAVE_OUT)
