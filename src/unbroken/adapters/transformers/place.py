"""Where in the data a run of the host's Trainer is, counted as batches are used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback


@dataclass
class Place:
    """A place between two steps of a run.

    Attributes:
        epoch: The pass over the data that is under way, from 0.
        batches: Micro-batches of this pass that are done, on each rank.
        samples: Samples of this pass that are done, on all ranks together.
        is_even: Whether all of them were cut in the way that this start cuts them.
        is_over: Whether the end of the pass has been told to callbacks.
    """

    epoch: int = 0
    batches: int = 0
    samples: int = 0
    is_even: bool = True
    is_over: bool = False


class Follower(TrainerCallback):  # type: ignore[misc]
    """Moves the place as the host's training loop goes on.

    Args:
        samples_per_batch: Samples that all ranks use in one micro-batch; may be set.

    Attributes:
        place: Where the run is.
    """

    def __init__(self, samples_per_batch: int) -> None:
        self.place = Place()
        self.samples_per_batch = samples_per_batch

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Count a micro-batch inside an accumulation window."""
        self.place.batches += 1
        self.place.samples += self.samples_per_batch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count the last micro-batch of a step."""
        self.on_substep_end()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Take note that the pass is over: an evaluation or a save may follow."""
        self.place.is_over = True
