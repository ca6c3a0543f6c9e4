"""From a micro-batch to a loss and gradients: precision, scaling, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from unbroken.distributed.dtensors import is_dtensor, local_part, sharded_as, whole
from unbroken.errors import ConfigError, DataError
from unbroken.training.config import TrainerConfig

# Clipping of gradients, those of sharded parameters included.


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor | None:
    """Scale the gradients down to a norm, if their own is larger; 0: leave them as they are.

    Returns:
        The norm over all of them, of all ranks that share the parameters, before clipping;
        None where there is no clipping.
    """
    parameters = list(parameters)
    if any(is_dtensor(p.grad) for p in parameters):
        return _clip_shards(parameters, max_norm)
    return clip_grad_norm_(parameters, max_norm) if max_norm > 0 else None


def _clip_shards(parameters: list[Tensor], max_norm: float) -> Tensor | None:
    """As `clip_grad_norm_`, which takes no gradients that lie on different meshes."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = sharded_as(parameter, parameter.grad)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not max_norm > 0:
        return None
    by_mesh: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if is_dtensor(gradient) else None
        by_mesh.setdefault(mesh, []).append(gradient)
    norms = [whole(get_total_norm(of_one_mesh)) for of_one_mesh in by_mesh.values()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], coefficient)
    return norm


# Mixed precision: autocast, gradient scaling and clipping around one optimizer step.


class Precision:
    """Runs forward passes, backward passes and optimizer steps in the configured precision.

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


# From a batch to a loss: what a model is called with, and how micro-batches are weighted.


LossFn = Callable[[Any, Any], Tensor]
"""A criterion as PyTorch has them: `loss_fn(outputs, labels)`, a mean over the labels."""

IGNORED = -100
"""A label that does not count: PyTorch's default `ignore_index`."""


def compute_loss(model: nn.Module, data: Any, loss_fn: LossFn | None) -> Tensor:
    """Return the mean loss of one micro-batch.

    Args:
        model: Called as `model(**data)` with a mapping, else as `model(inputs)` with the first
            part of a pair.
        data: A mapping of tensors (Hugging Face's convention), or a pair (inputs, labels).
        loss_fn: Called as `loss_fn(outputs, labels)`. None: the model returns its own loss, as
            `outputs.loss`, `outputs["loss"]`, or a scalar tensor.

    Returns:
        A scalar tensor.

    Raises:
        ConfigError: If there is no loss to be found.
    """
    outputs = model(**data) if isinstance(data, Mapping) else model(_inputs(data))
    if loss_fn is not None:
        return loss_fn(outputs, labels_of(data))
    loss = outputs if isinstance(outputs, Tensor) else _loss_in(outputs)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(
            "loss",
            "the model returned none",
            expected="a scalar tensor, or outputs with a `loss`",
            found=type(outputs).__name__ if loss is None else f"shape {tuple(loss.shape)}",
            hint="give Trainer(loss_fn=...), or labels in the batch for a Hugging Face model",
        )
    return loss


def labels_of(data: Any) -> Any:
    """Return the labels of a batch: `data["labels"]`, or the second part of a pair."""
    if isinstance(data, Mapping):
        if "labels" not in data:
            raise DataError("batch", "has no labels", expected='"labels"', found=sorted(data))
        return data["labels"]
    if isinstance(data, list | tuple) and len(data) == 2:
        return data[1]
    raise DataError("batch", expected="a mapping or (inputs, labels)", found=type(data).__name__)


def weight_of(data: Any, samples: int) -> int:
    """Return how many labels a micro-batch's mean loss is a mean of.

    For a language model these are the labels that are not ignored, the first of each row left
    out, since the model shifts them; for anything else the number of samples.
    """
    labels = data.get("labels") if isinstance(data, Mapping) else None
    if not isinstance(labels, Tensor) or "input_ids" not in data or labels.ndim != 2:
        return samples
    return int((labels[:, 1:] != IGNORED).sum())


def tokens_of(data: Any) -> int:
    """Return the number of tokens in a micro-batch, 0 where it has no `input_ids`."""
    ids = data.get("input_ids") if isinstance(data, Mapping) else None
    return ids.numel() if isinstance(ids, Tensor) else 0


def to_device(data: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it on `device`."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    if isinstance(data, Mapping):
        return {key: to_device(value, device) for key, value in data.items()}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_device(value, device) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(to_device(value, device) for value in data)
    return data


def _inputs(data: Any) -> Any:
    return data[0] if isinstance(data, list | tuple) and len(data) == 2 else data


def _loss_in(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    return getattr(outputs, "loss", None)
