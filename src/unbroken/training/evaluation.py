"""One pass over the evaluation data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from unbroken.errors import DataError
from unbroken.training.loss import LossFn, compute_loss, to_device, weight_of
from unbroken.training.precision import Precision


def evaluation_loader(dataset: Any, batch_size: int, collate_fn: Any, seed: int) -> Iterable[Any]:
    """Return batches of an evaluation data set in its own order; a loader is taken as it is.

    Raises:
        DataError: If the data set is empty.
    """
    if not hasattr(dataset, "__getitem__"):
        return dataset  # type: ignore[no-any-return]
    if len(dataset) == 0:
        raise DataError("eval_dataset", "is empty")
    # Its own generator: iter(DataLoader) would otherwise draw from the global one.
    generator = torch.Generator().manual_seed(seed % 2**63)
    return DataLoader(dataset, batch_size, collate_fn=collate_fn, generator=generator)


def mean_loss(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None,
    precision: Precision,
    device: torch.device,
) -> float:
    """Return the mean loss over all labels, the model in evaluation mode meanwhile.

    Every submodule is put back into the mode it was in.

    Raises:
        DataError: If there is no batch.
    """
    modes = {module: module.training for module in model.modules()}
    total, count = 0.0, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                data = to_device(batch, device)
                with precision.autocast():
                    loss = compute_loss(model, data, loss_fn)
                weight = weight_of(batch, _rows(batch))
                total += float(loss) * weight
                count += weight
    finally:
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise DataError("eval_dataset", "gave no batch")
    return total / count


def _rows(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor."""
    values = batch.values() if hasattr(batch, "values") else batch
    if isinstance(values, torch.Tensor):
        return len(values)
    return next((len(value) for value in values if isinstance(value, torch.Tensor)), 1)
