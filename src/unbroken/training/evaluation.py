"""One pass over the evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unbroken.data import derive_key, keyed_random
from unbroken.data.worker_signals import leave_signals_of
from unbroken.distributed.dtensors import whole
from unbroken.errors import ConfigError, DataError
from unbroken.training.config import TrainerConfig
from unbroken.training.gradient_sums.data_parallel import Division
from unbroken.training.step import LossFn, Precision, compute_loss, to_device, weight_of


class Evaluator:
    """Computes the mean loss over evaluation data; nothing of the run is changed by it.

    What is random in the data is the same in each evaluation; the ambient generators, and the
    mode of every submodule, are put back.

    Args:
        forward: The model, or its compiled form.
        config: `eval_batch_size`, `seed`.
        collate_fn: Makes a batch of samples; None: PyTorch's default.
        loss_fn: As `compute_loss` takes it.
        precision: Autocast.
        device: Where the model is.
        division: How ranks share the evaluation.
    """

    def __init__(
        self,
        forward: nn.Module,
        config: TrainerConfig,
        collate_fn: Callable[[list[Any]], Any] | None,
        loss_fn: LossFn | None,
        *,
        precision: Precision,
        device: torch.device,
        division: Division,
    ) -> None:
        self._forward = forward
        self._batch_size = config.eval_batch_size or config.per_forward
        self._key = derive_key(config.seed, "evaluate")
        self._collate_fn = collate_fn
        self._loss_fn = loss_fn
        self._precision = precision
        self._device = device
        self._division = division

    def mean_loss(self, dataset: Any) -> float:
        """Return the mean loss over all labels.

        Args:
            dataset: A map-style data set, read in its own order; or an iterable of batches.

        Raises:
            ConfigError: If there is no data set.
            DataError: If it gives no batch.
        """
        if dataset is None:
            raise ConfigError("eval_dataset", "is needed for evaluation")
        modes = {module: module.training for module in self._forward.modules()}
        self._forward.eval()
        try:
            with keyed_random(self._key, cuda=self._device.type == "cuda"), torch.no_grad():
                found = [(self._loss_and_weight(b), counts) for b, counts in self._own(dataset)]
        finally:
            for module, training in modes.items():
                module.training = training
        losses = self._of_all_parts([loss for loss, counts in found if counts])
        count = sum(weight for _, weight in losses)
        if count == 0:
            raise DataError("eval_dataset", "gave no labels")
        return sum(loss * weight for loss, weight in losses) / count

    def _own(self, dataset: Any) -> Iterator[tuple[Any, bool]]:
        """Yield this rank's batches, every so manieth, and whether each counts.

        FSDP gathers weights in each forward pass, so that all ranks need as many: where there
        is no batch left for this one, it runs another's once more, which does not count.
        """
        part, parts = self._division.part, self._division.parts
        batches = iter(self._batches(dataset))
        while some := list(islice(batches, parts)):
            if part < len(some):
                yield some[part], True
            elif self._division.by_fsdp:
                yield some[0], False

    def _of_all_parts(self, losses: list[tuple[Tensor, int]]) -> list[tuple[float, int]]:
        """Return the losses of all batches in the order of the batches, so the same on all."""
        own = [[float(loss), weight] for loss, weight in losses]
        rounds = zip_longest(*self._division.gather("the evaluation", own))
        return [(one[0], one[1]) for batches in rounds for one in batches if one is not None]

    def _loss_and_weight(self, batch: Any) -> tuple[Tensor, int]:
        with self._precision.autocast():
            loss = compute_loss(self._forward, to_device(batch, self._device), self._loss_fn)
        return whole(loss), weight_of(batch, _rows(batch))

    def _batches(self, dataset: Any) -> Iterable[Any]:
        if not hasattr(type(dataset), "__getitem__"):
            own = getattr(dataset, "generator", None)
            if isinstance(own, torch.Generator):  # a shuffling loader: the same order each time
                own.manual_seed(self._key % 2**63)
            leave_signals_of(dataset)
            return dataset  # type: ignore[no-any-return]
        # Its own generator: iter(DataLoader) would otherwise draw from the global one.
        generator = torch.Generator().manual_seed(self._key % 2**63)
        return DataLoader(
            dataset, self._batch_size, collate_fn=self._collate_fn, generator=generator
        )


def _rows(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor."""
    values = batch.values() if hasattr(batch, "values") else batch
    if isinstance(values, torch.Tensor):
        return len(values)
    return next((len(value) for value in values if isinstance(value, torch.Tensor)), 1)
