"""The same training in each trainer, resumed by the same call: one place for all benchmarks."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from trainers.work import Work

_PLACES = {
    "unbroken": "ours",
    "unbroken drop-in": "drop_in",
    "transformers": "hugging_face",
    "Lightning": "lightning_module",
    "torch.save loop": "torch_loop",
}
TRAINERS = tuple(_PLACES)


def module_of(name: str) -> ModuleType:
    """Return the module of a trainer.

    It has `train(work)`, which goes on from the newest checkpoint if there is one;
    `checkpoints(folder)`, oldest first; and `deepen(work, step)`, which makes a checkpoint as a
    run of so many steps would have it.
    """
    return import_module(f"trainers.{_PLACES[name]}")


__all__ = ["TRAINERS", "Work", "module_of"]
