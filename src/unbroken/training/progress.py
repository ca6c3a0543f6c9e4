"""How far a run is: the only counters of the loop, immutable."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from unbroken.errors import CorruptCheckpointError


@dataclass(frozen=True)
class Progress:
    """The point that a run has reached.

    Attributes:
        step: Completed optimizer steps; 0 is the untrained model.
        samples: Training samples used, pending ones of an accumulation window included.
        tokens: Tokens used; 0 where the data has none (no `input_ids`).
        pending: Micro-batches of the unfinished step whose gradients are in the model.
        epoch: Completed passes over the data, with the started one as a fraction.

    Example:
        >>> progress = Progress().after_micro_batch(samples=8, tokens=512)
        >>> progress.after_step(epoch=0.25)
        Progress(step=1, samples=8, tokens=512, pending=0, epoch=0.25)
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    pending: int = 0
    epoch: float = 0.0

    @classmethod
    def of(cls, stored: object) -> Progress:
        """Return what a checkpoint says; None: it says nothing, as before the first step.

        Raises:
            CorruptCheckpointError: No run can be there.
        """
        numbers = {} if stored is None else stored
        names = [field.name for field in fields(cls)]
        if not isinstance(numbers, Mapping) or not all(
            name in names and _counts(value, is_whole=name != "epoch")
            for name, value in numbers.items()
        ):
            what = "is not how far a run can be"
            raise CorruptCheckpointError("progress", what, expected=names, found=stored)
        return cls(**numbers)

    def after_micro_batch(self, *, samples: int, tokens: int) -> Progress:
        """Return the progress after one more forward and backward pass.

        Args:
            samples: All samples used by then.
            tokens: Tokens in this micro-batch.
        """
        return Progress(self.step, samples, self.tokens + tokens, self.pending + 1, self.epoch)

    def after_step(self, epoch: float) -> Progress:
        """Return the progress after the optimizer's step."""
        return Progress(self.step + 1, self.samples, self.tokens, 0, epoch)


def _counts(value: object, *, is_whole: bool) -> bool:
    kinds = (int,) if is_whole else (int, float)
    return type(value) in kinds and 0 <= value < math.inf and value < 2**63  # type: ignore[operator]
