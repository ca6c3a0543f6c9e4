"""From a batch to a loss: what a model is called with, and how micro-batches are weighted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unbroken.errors import ConfigError, DataError

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
