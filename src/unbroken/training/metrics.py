"""What a run reports about itself; part of its state, so that nothing is counted twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from unbroken.errors import ConfigError, CorruptCheckpointError, one_of
from unbroken.stored_names import stored_name
from unbroken.training.config import TrainerConfig
from unbroken.training.data_parallel import DataParallelLayout
from unbroken.training.micro_batches import StepResult
from unbroken.training.progress import Progress

_NUMBER, _COUNT, _TEXT = (int, float), (int,), (str,)
_KINDS: Mapping[str, tuple[tuple[type, ...], bool]] = {
    "best_metric": (_NUMBER, True),
    "best_step": (_COUNT, True),
    "evaluations_without_gain": (_COUNT, False),
    "seconds": (_NUMBER, False),
    "data_digest": (_TEXT, True),
    "loss_sum": (_NUMBER, False),
    "steps": (_COUNT, False),
    "grad_norm": (_NUMBER, True),
    "learning_rate": (_NUMBER, False),
    "logged_tokens": (_COUNT, False),
    "logged_seconds": (_NUMBER, False),
}
"""Each part of the state: its kinds, and whether it may be None."""


@stored_name("unbroken.training.statistics.Statistics")
class Statistics:
    """Sums since the last log line, the best metric, and the wall time of all segments.

    The loss is summed in float64 on its own device: no synchronisation per step.
    """

    def __init__(self) -> None:
        self.best_metric: float | None = None
        self.best_step: int | None = None
        self.evaluations_without_gain = 0
        self.seconds = 0.0
        self.data_digest: str | None = None
        self.loss_sum: Tensor | float = 0.0
        self.steps = 0
        self.grad_norm: Tensor | float | None = None
        self.learning_rate = 0.0
        self.logged_tokens = 0
        self.logged_seconds = 0.0

    def add_step(self, step: StepResult) -> None:
        """Count one optimizer step."""
        self.loss_sum = self.loss_sum + step.loss.to(torch.float64)
        self.grad_norm = step.grad_norm
        self.learning_rate = step.learning_rate
        self.steps += 1

    def add_data(self, digests: Iterable[str]) -> None:
        """Take the digests of micro-batches into the running digest of all data used.

        The digest is a chain, so that one short text is its whole state:
        digest = xxh3-128(previous digest, digest of a micro-batch).
        """
        for one in digests:
            self.data_digest = xxhash.xxh3_128(
                f"{self.data_digest or ''}{one}".encode()
            ).hexdigest()

    def log(self, progress: Progress) -> dict[str, Any]:
        """Return the mean loss, gradient norm and speed since the last call, and start anew."""
        tokens = progress.tokens
        seconds = self.seconds - self.logged_seconds
        record: dict[str, Any] = {
            "samples": progress.samples,
            "tokens": tokens,
            "learning_rate": self.learning_rate,
            "loss": float(self.loss_sum) / max(1, self.steps),
        }
        if self.grad_norm is not None:
            record["grad_norm"] = float(self.grad_norm)
        if self.data_digest is not None:
            record["data_digest"] = self.data_digest
        record["seconds"] = round(self.seconds, 3)
        if tokens and seconds > 0:
            record["tokens_per_second"] = round((tokens - self.logged_tokens) / seconds, 1)
        self.loss_sum, self.steps = 0.0, 0
        self.logged_tokens, self.logged_seconds = tokens, self.seconds
        return record

    def consider(self, metrics: Mapping[str, float], step: int, config: TrainerConfig) -> bool:
        """Take note of an evaluation; return whether it is the best so far.

        Raises:
            ConfigError: If `metric_for_best_model` is not among the metrics.
        """
        name = config.metric_for_best_model
        if name not in metrics:
            raise ConfigError("metric_for_best_model", expected=one_of(sorted(metrics)), found=name)
        gain = self._gain(float(metrics[name]), config.greater_is_better)
        gained = gain is None or gain > config.early_stopping_threshold  # NaN is no gain
        self.evaluations_without_gain = 0 if gained else self.evaluations_without_gain + 1
        if (gain is not None and not gain > 0) or math.isnan(float(metrics[name])):
            return False
        self.best_metric, self.best_step = float(metrics[name]), step
        return True

    def forget_best(self) -> None:
        """Begin anew to look for the best: the metric is another one."""
        self.best_metric, self.best_step, self.evaluations_without_gain = None, None, 0

    def _gain(self, value: float, greater_is_better: bool) -> float | None:
        """Return how much better `value` is than the best so far; None when it is the first."""
        if self.best_metric is None or math.isnan(self.best_metric):
            return None
        return value - self.best_metric if greater_is_better else self.best_metric - value

    def state_dict(self) -> dict[str, Any]:
        """Return everything, the unfinished sums included."""
        values = {name: getattr(self, name) for name in _KINDS}
        grad_norm = None if self.grad_norm is None else float(self.grad_norm)
        return {**values, "loss_sum": float(self.loss_sum), "grad_norm": grad_norm}

    def check_state_dict(self, state: Any) -> None:
        """Raise unless `load_state_dict` can take a state.

        Raises:
            CorruptCheckpointError: It is not what `state_dict` returns.
        """
        own = self.state_dict()
        if not isinstance(state, dict) or not own.keys() <= state.keys():
            raise CorruptCheckpointError("statistics", "lack a number", expected=[*own])
        for name in own:
            kinds, may_be_none = _KINDS[name]
            value = state[name]
            if not (isinstance(value, kinds) or (may_be_none and value is None)):
                what = "is not a number" if kinds != (str,) else "is not a text"
                raise CorruptCheckpointError(f"statistics.{name}", what, found=repr(value)[:80])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name in _KINDS:
            setattr(self, name, state[name])


# The digest of a batch: proof of which data was used, in which order.


def batch_digest(data: Any) -> str:
    """Return the xxh3-128 digest of the bytes of all tensors in a batch, in a fixed order.

    Example:
        >>> batch_digest([torch.ones(2)]) == batch_digest({"x": torch.ones(2)})
        True
    """
    digest = xxhash.xxh3_128()
    for tensor in _tensors_in(data):
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


class DataDigest:
    """Chains the digests of all micro-batches into the statistics, in the order of the stream.

    Args:
        statistics: Keep the chain, as a part of the run's state.
        division: How ranks share each step.
    """

    def __init__(self, statistics: Statistics, division: DataParallelLayout) -> None:
        self._statistics = statistics
        self._division = division
        self._pending: list[str] = []

    def add(self, data: Any) -> None:
        """Count a micro-batch of this rank."""
        digest = batch_digest(data)
        if self._division.parts == 1:
            self._statistics.add_data([digest])
        else:
            self._pending.append(digest)

    def step_is_over(self) -> None:
        """Chain what all ranks used in a step, part by part."""
        if self._pending:
            for digests in self._division.gather("the data of a step", list(self._pending)):
                self._statistics.add_data(digests)
            self._pending.clear()


def _tensors_in(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for key in sorted(data):
            yield from _tensors_in(data[key])
    elif isinstance(data, list | tuple):
        for part in data:
            yield from _tensors_in(part)
