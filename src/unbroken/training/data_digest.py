"""The digest of a batch: proof of which data was used, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from unbroken.training.division import Division
from unbroken.training.statistics import Statistics


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

    def __init__(self, statistics: Statistics, division: Division) -> None:
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
