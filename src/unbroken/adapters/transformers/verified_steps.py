"""Every N-th step of the host is run twice: its `training_step`, with all that subclasses add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from unbroken.adapters.transformers.session import TrainSession
from unbroken.verification import StepVerifier, Subject, cloned


class VerifiedSteps(TrainerCallback):  # type: ignore[misc]
    """Stands between the host's loop and its `training_step`, and hears of the optimizer's steps.

    Args:
        trainer: The trainer.
        session: The run.
        every: Each so manieth step is verified.
        tell: Called with a line for the user.

    Attributes:
        verifier: Runs the steps twice.
    """

    def __init__(
        self,
        trainer: transformers.Trainer,
        session: TrainSession,
        every: int,
        tell: Callable[[str], None],
    ) -> None:
        self._trainer, self._session = trainer, session
        self._plain = trainer.training_step  # the outermost, where subclasses have their own
        self._model: Any = trainer.model
        self._step = -1
        self.verifier = StepVerifier(every, session.group, self._subject, tell)

    @classmethod
    def of(
        cls,
        trainer: transformers.Trainer,
        session: TrainSession,
        every: int | None,
        tell: Callable[[str], None],
    ) -> VerifiedSteps | None:
        """Return it, in its place until `end` is called; None where no step is verified.

        Raises:
            ConfigError: `every` is no positive number.
        """
        if every is None:
            return None
        made = cls(trainer, session, every, tell)
        trainer.add_callback(made)
        trainer.training_step = made.training_step
        return made

    def end(self) -> None:
        """Give the place back."""
        del self._trainer.training_step  # which had hidden the method
        self._trainer.remove_callback(self)

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Do what the trainer does in a micro-batch; twice, where its step is verified."""
        trainer, verifier, self._model = self._trainer, self.verifier, model
        step = trainer.state.global_step + 1
        if step != self._step:
            self._step = step
            verifier.step_begins(step)
        if not verifier.is_due(step):
            return self._plain(model, inputs, *arguments, **options)
        kept, losses = cloned(inputs), []

        def first() -> Any:
            losses.append(self._plain(model, inputs, *arguments, **options))
            return losses[-1]

        def again() -> Any:
            losses.append(self._plain(model, cloned(kept), *arguments, **options))
            return losses[-1]

        verifier.verify(step, first, again, is_last=trainer.accelerator.sync_gradients)
        return losses[-1]

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Take the digests of weights and moments, where the next step compares them."""
        self.verifier.step_ends(self._trainer.state.global_step + 1)

    def _subject(self) -> Subject:
        """Return what is verified in a step."""
        trainer = self._trainer
        kinds = [type(one) for one in trainer.callback_handler.callbacks]
        is_plain = type(trainer).__module__.startswith("unbroken.")
        return Subject(
            self._model,
            getattr(trainer.optimizer, "optimizer", trainer.optimizer),
            {"trainer": trainer, "loss": trainer.compute_loss_func},
            has_user_code=not is_plain or not all(map(_is_of_host, kinds)),
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
            unobserved=self._session.checkpointer.confirmation.observer.paused,
        )


def _is_of_host(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("transformers", "unbroken")
