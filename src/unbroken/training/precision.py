"""Mixed precision: autocast, gradient scaling and clipping around one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from unbroken.training.clipping import clip_gradients
from unbroken.training.config import TrainerConfig


class Precision:
    """Runs forward passes, backward passes and optimizer steps in the configured precision.

    Args:
        config: `fp16`, `bf16`, `max_grad_norm`.
        device: The device of the model.

    Attributes:
        scaler: The gradient scaler with `fp16`, else None; part of the state of the run.
    """

    def __init__(self, config: TrainerConfig, device: torch.device) -> None:
        self.scaler = GradScaler(device.type) if config.fp16 else None
        self._device = device
        self._max_grad_norm = config.max_grad_norm
        self._dtype = torch.float16 if config.fp16 else torch.bfloat16 if config.bf16 else None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context for a forward pass."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, scaled when a scaler is at work."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def step(
        self, optimizer: Optimizer, parameters: Iterable[Tensor]
    ) -> tuple[Tensor | None, bool]:
        """Clip and step.

        Returns:
            The norm of the gradients before clipping (None without clipping), and whether the
            optimizer really stepped (the scaler skips a step with infinite gradients).
        """
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = clip_gradients(parameters, self._max_grad_norm)
        if self.scaler is None:
            optimizer.step()
            return norm, True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm, self.scaler.get_scale() >= before
