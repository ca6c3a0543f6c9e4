"""Our class in the place of transformers' Trainer."""

from __future__ import annotations

from dataclasses import replace

from trainers.hugging_face import checkpoints, make
from trainers.work import Work
from unbroken.adapters.transformers import Trainer


def train(work: Work) -> None:
    make(work, Trainer).train()


def deepen(work: Work, step: int) -> None:
    from trainers import hugging_face

    hugging_face.deepen(work, step)
    stop = _Stop(step + 1)
    make(replace(work, max_steps=step + 1, save_steps=step + 1, on_step=stop), Trainer).train()


class _Stop:
    """Does nothing at the step that is taken to have a checkpoint of our own."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, step: int) -> None:
        if step != self.step:
            raise SystemExit(f"step {step} in place of {self.step}")


__all__ = ["checkpoints", "deepen", "train"]
