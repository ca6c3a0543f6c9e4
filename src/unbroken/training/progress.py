"""How far a run is: the only counters of the loop, immutable."""

from __future__ import annotations

from dataclasses import dataclass


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
