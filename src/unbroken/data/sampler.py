"""How the global stream is cut into optimizer steps, micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unbroken.data.order import GlobalOrder, SampleKey
from unbroken.errors import ConfigError


@dataclass(frozen=True)
class BatchShape:
    """How one global batch is cut: A micro-batches of m samples on each of W ranks.

    Args:
        global_batch_size: G, samples in one optimizer step, over all ranks.
        micro_batch_size: m, samples in one forward pass on one rank.
        rank: This rank, 0 <= rank < world_size.
        world_size: W, number of ranks.

    Raises:
        ConfigError: A size is not positive, or G is not divisible by m * W.

    Example:
        >>> BatchShape(32, 4, rank=0, world_size=2).accumulation
        4
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "world_size"):
            if getattr(self, name) < 1:
                raise ConfigError(name, expected="at least 1", found=getattr(self, name))
        if not 0 <= self.rank < self.world_size:
            raise ConfigError("rank", expected=f"0 to {self.world_size - 1}", found=self.rank)
        if self.global_batch_size % self.stride:
            raise ConfigError(
                "global_batch_size",
                "must be divisible by micro_batch_size * world_size",
                expected=f"a multiple of {self.micro_batch_size} * {self.world_size}",
                found=self.global_batch_size,
            )

    @property
    def stride(self) -> int:
        """Samples in one micro-batch of all ranks together: m * W."""
        return self.micro_batch_size * self.world_size

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each rank: A = G / (m * W)."""
        return self.global_batch_size // self.stride

    def left_in_step(self, position: int) -> int:
        """Return how many micro-batches a rank still has to use in the step at a position.

        Args:
            position: Samples used by all ranks; it may lie in the middle of a step.

        Returns:
            1 to A; at the edge of a step, A.

        Raises:
            ConfigError: The samples left in the step cannot be cut into whole micro-batches.
        """
        left = self.global_batch_size - position % self.global_batch_size
        if left % self.stride:
            raise ConfigError(
                "micro_batch_size",
                f"position {position} lies in the middle of an optimizer step whose "
                f"{left} samples left must be cut into whole micro-batches of all ranks",
                expected=f"a divisor of {left}",
                found=f"{self.micro_batch_size} * {self.world_size} ranks",
                hint="Use the sizes of the run that saved this position, for this step at least.",
            )
        return left // self.stride


class MicroBatchSampler:
    """The samples of one rank, micro-batch by micro-batch, from any position on, endless.

    Optimizer step s takes the global positions [s*G, (s+1)*G) of the order; rank r takes the r-th
    of W equal parts of them, and its micro-batch a the a-th m samples of that part. So world
    size, accumulation and workers only cut the stream; they never change which samples a step
    uses, nor their order; and the micro-batches of all ranks are those of one.

    It is a `batch_sampler` for a plain `torch.utils.data.DataLoader`; give that loader its own
    `generator=` as well, because `iter(DataLoader)` else draws from torch's global generator.

    Args:
        order: The global order.
        global_batch_size: G, samples in one optimizer step, over all ranks.
        micro_batch_size: m, samples in one forward pass on one rank.
        rank: This rank.
        world_size: W, number of ranks.
        start: Samples used so far by all ranks; it may lie in the middle of a step.
        steps_from: The position that steps of this size are counted from.

    Raises:
        ConfigError: The sizes do not fit each other, or not the start position.

    Example:
        >>> order = GlobalOrder(8, seed=0, shuffle=False)
        >>> sampler = MicroBatchSampler(order, 4, 1, rank=1, world_size=2, start=4)
        >>> batches = iter(sampler)
        >>> next(batches), next(batches), next(batches)
        ([6], [7], [2])
    """

    def __init__(
        self,
        order: GlobalOrder,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        *,
        steps_from: int = 0,
    ) -> None:
        if start < 0:
            raise ConfigError("start", expected="a position >= 0", found=start)
        self.order = order
        self.shape = BatchShape(global_batch_size, micro_batch_size, rank, world_size)
        self.start = start
        self.shape.left_in_step(start - steps_from)
        self._steps_from = steps_from

    def places(self) -> Iterator[int]:
        """Yield the position of the first sample of each micro-batch of this rank."""
        shape, begin = self.shape, self.start
        left = shape.left_in_step(self.start - self._steps_from)
        while True:
            for micro in range(left):  # of a step that is pending only the rest is dealt out
                yield begin + (shape.rank * left + micro) * shape.micro_batch_size
            begin += left * shape.stride
            left = shape.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        size = self.shape.micro_batch_size
        for first in self.places():
            yield self.order.keys(first, first + size)
