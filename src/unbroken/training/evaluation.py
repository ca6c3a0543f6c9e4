"""Evaluations in the middle of a run: when, over which data, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from unbroken.checkpoint import Cadence, Timer
from unbroken.data import derive_key, keyed_random
from unbroken.data.worker_signals import leave_signals_of
from unbroken.distributed import Group
from unbroken.distributed.dtensors import whole
from unbroken.errors import ConfigError, DataError, OutOfMemoryError
from unbroken.training.config import TrainerConfig
from unbroken.training.micro_batches import compute_loss, to_device, weight_of
from unbroken.training.run_state import RunState
from unbroken.training.setup import Parts
from unbroken.training.step import is_out_of_memory


class Evaluator:
    """Computes the mean loss over evaluation data; nothing of the run is changed by it.

    What is random in the data is the same in each evaluation; the ambient generators, and the
    mode of every submodule, are put back.
    """

    def __init__(self, parts: Parts, config: TrainerConfig) -> None:
        self._forward = parts.forward
        self._batch_size = config.eval_batch_size or config.per_forward
        self._key = derive_key(config.seed, "evaluate")
        self._collate_fn = parts.collate_fn
        self._loss_fn = parts.loss_fn
        self._precision = parts.precision
        self._device = parts.device
        self._division = parts.division

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
        """Yield every n-th batch (n ranks), and whether its loss counts.

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


class Evaluation:
    """Evaluates a run when it is due, and judges what was found."""

    def __init__(self, parts: Parts, state: RunState, clock: Callable[[], float]) -> None:
        self._parts = parts
        self._state = state
        self._evaluator = Evaluator(parts, state.config)
        cadence = Cadence(state.config.eval_steps, state.config.eval_minutes)
        self._timer = Timer(cadence, clock)

    def mean_loss(self, dataset: Any) -> float:
        """Return the mean loss over all labels; a deferred model is initialised first.

        Raises:
            ConfigError: If there is no data set.
            DataError: If it gives no batch.
        """
        self._parts.construction.initialise()
        return self._evaluator.mean_loss(dataset)

    def is_due(self) -> bool:
        """Return whether to evaluate now; the ranks need not see the same time."""
        if not self._state.config.evaluates:
            return False
        due = self._timer.due(self._state.progress.step)
        if self._state.config.eval_minutes is not None:
            due = self._parts.group.any(due)
        return due or self._state.is_finished

    def metrics(self, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Return what `evaluate` gives on rank 0, on all ranks.

        Raises:
            OutOfMemoryError: If there is not memory enough for it.
        """
        seed, step = self._state.config.seed, self._state.progress.step
        self._parts.randomness.seed(derive_key(seed, "evaluate", step))
        own = {name: float(value) for name, value in self._run(evaluate).items()}
        metrics = _of_rank_0(self._parts.group, own)
        self._timer.done()
        return metrics

    def judge(self, metrics: Mapping[str, float]) -> bool:
        """Return whether metrics are the best so far; step a schedule that follows one of them."""
        config, scheduler = self._state.config, self._parts.scheduler
        is_best = self._state.statistics.consider(metrics, self._state.progress.step, config)
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(metrics[config.metric_for_best_model])
        return is_best

    def reason_to_stop(self) -> str | None:
        """Return why to end the run early; None: there is no reason."""
        patience = self._state.config.early_stopping_patience
        if patience is None or self._state.statistics.evaluations_without_gain < patience:
            return None
        return f"early stopping: {patience} evaluations without a better metric"

    def _run(self, evaluate: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        try:
            return evaluate()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = self._state.config.eval_batch_size or self._state.config.per_forward
            raise OutOfMemoryError(
                f"evaluation after step {self._state.progress.step}",
                f"does not fit into the memory of {self._parts.device}",
                found=f"eval_batch_size {size}: {error}",
                hint=f"choose a smaller portion: eval_batch_size={max(1, size // 2)}",
            ) from error


def _of_rank_0(group: Group, metrics: dict[str, float]) -> dict[str, float]:
    """Return rank 0's metrics on all ranks, bit for bit."""
    if group.world_size == 1:
        return metrics
    text: Any = group.broadcast("metrics", {name: v.hex() for name, v in metrics.items()})
    return {name: float.fromhex(value) for name, value in text.items()}


def _rows(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor."""
    values = batch.values() if hasattr(batch, "values") else batch
    if isinstance(values, torch.Tensor):
        return len(values)
    return next((len(value) for value in values if isinstance(value, torch.Tensor)), 1)
