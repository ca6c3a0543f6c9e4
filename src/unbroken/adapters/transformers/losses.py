"""The losses that the host adds up between two lines of its log, and over the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unbroken.adapters.transformers.trainer import Trainer


class Losses:
    """Reads and sets what the host's loop keeps in attributes of its own.

    Args:
        trainer: In training: before that, the host has none of it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def values(self) -> dict[str, Any]:
        """Return all of it, exactly."""
        trainer = self._trainer
        return {
            "since_log": float(trainer._tr_loss.item()),  # noqa: SLF001 (the host's own)
            "logged": float(trainer._total_loss_scalar),  # noqa: SLF001
            "last_logged": int(trainer._globalstep_last_logged),  # noqa: SLF001
            "first_step": int(getattr(trainer, "_initial_global_step", 0)),  # since 5.4
        }

    def bring_back(self, values: Mapping[str, Any]) -> None:
        """Set it to what it was: the next line of the log, and train_loss, are the run's."""
        trainer = self._trainer
        trainer._tr_loss.fill_(values["since_log"])  # noqa: SLF001
        trainer._total_loss_scalar = values["logged"]  # noqa: SLF001
        trainer._globalstep_last_logged = values["last_logged"]  # noqa: SLF001
        trainer._initial_global_step = values["first_step"]  # noqa: SLF001


def no_losses(step: int) -> dict[str, Any]:
    """Return what the host begins with when it resumes at a step."""
    return {"since_log": 0.0, "logged": 0.0, "last_logged": step, "first_step": step}
