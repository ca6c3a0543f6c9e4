"""The accumulation window: what the micro-batches of one optimizer step have gathered so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from unbroken.capture import capture_gradients, restore_gradients
from unbroken.data import MicroBatch
from unbroken.distributed.dtensors import whole
from unbroken.errors import CorruptCheckpointError, DataError
from unbroken.stored_names import stored_name
from unbroken.training.gradient_sums.data_parallel import DataParallelLayout
from unbroken.training.step.forward import tokens_of, weight_of


@stored_name("unbroken.training.window.Window")
class Window:
    """What an unfinished optimizer step has gathered: gradients, loss, and the labels in all.

    It is part of the state of a run, so that a save inside the window loses nothing; at a step
    edge it is empty.

    Args:
        model: Whose parameters hold the gradients.
        division: How ranks share the step.

    Attributes:
        loss: The weighted mean loss of the micro-batches so far, or None before the first.
        tokens: Tokens in the step, of all ranks.
    """

    def __init__(self, model: nn.Module, division: DataParallelLayout) -> None:
        self.loss: Tensor | None = None
        self._model = model
        self._weight = 0
        self._division = division
        self.tokens = 0

    def shares(self, micro_batches: Sequence[MicroBatch]) -> list[float]:
        """Return each micro-batch's share of the step's mean loss.

        Each label counts the same, in whatever micro-batch it stands. (Equal shares would give
        the labels of short sequences more weight: transformers#34191.)
        """
        if len(micro_batches) == 1 and self.loss is None and self._division.parts == 1:
            return [1.0]  # alone in its step
        weights = [weight_of(micro.data, micro.samples) for micro in micro_batches]
        if self.loss is None:
            tokens = sum(tokens_of(micro.data) for micro in micro_batches)
            total = self._division.sum([float(sum(weights)), float(tokens)])
            self._weight, self.tokens = map(int, total)
        return [weight / max(1, self._weight) for weight in weights]

    def add(self, loss: Tensor) -> None:
        """Count the loss of one micro-batch, already multiplied by its share."""
        loss = whole(loss.detach())
        self.loss = loss if self.loss is None else self.loss + loss

    def take_loss(self) -> Tensor:
        """Return the loss since the last call."""
        if self.loss is None:
            raise DataError("batch", "a lane has no micro-batch")
        loss, self.loss = self.loss, None
        return loss

    def clear(self) -> None:
        """Begin the next window."""
        self.loss, self._weight = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients by parameter name, the loss and the labels in all."""
        gradients = capture_gradients(self._model)
        return {"parameters": gradients, "loss": self.loss, "weight": self._weight}

    def check_state_dict(self, state: Any) -> None:
        """Raise unless `load_state_dict` can take a state.

        Raises:
            CorruptCheckpointError: It is not what `state_dict` returns.
        """
        own = {"parameters": dict, "loss": Tensor | None, "weight": int}
        if not isinstance(state, dict) or not all(
            name in state and isinstance(state[name], kind) for name, kind in own.items()
        ):
            raise CorruptCheckpointError("gradients", "are no window", expected=[*own])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; parameters without a gradient have none."""
        restore_gradients(self._model, state["parameters"])
        self.loss, self._weight = state["loss"], state["weight"]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss: The mean loss over all labels of the batch, on the device of the model.
        grad_norm: The norm of the gradients before clipping; None without clipping.
        learning_rate: The learning rate of the first parameter group in this step.
    """

    loss: Tensor
    grad_norm: Tensor | None
    learning_rate: float
