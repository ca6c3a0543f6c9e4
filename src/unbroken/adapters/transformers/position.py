"""Where in the data a run of the host's Trainer is, counted as batches are used."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from transformers import TrainerCallback

from unbroken.changes.differences import brief
from unbroken.errors import ConfigError, CorruptCheckpointError
from unbroken.stored_names import from_stored, to_stored


@dataclass
class DataPosition:
    """Where between two steps of a run its data are.

    Attributes:
        epoch: The pass over the data that is under way, from 0.
        batches: Micro-batches of this pass that are done, on each rank.
        samples: Samples of this pass that are done, on all ranks together.
        is_even: Whether all of them were batched as this start batches them.
        is_over: Whether the end of the pass has been told to callbacks.
    """

    epoch: int = 0
    batches: int = 0
    samples: int = 0
    is_even: bool = True
    is_over: bool = False


class PositionCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the position as the host's training loop goes on.

    Args:
        samples_per_batch: Samples that all ranks use in one micro-batch; may be set.

    Attributes:
        position: Where the run is.
    """

    def __init__(self, samples_per_batch: int) -> None:
        self.position = DataPosition()
        self.samples_per_batch = samples_per_batch

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Count a micro-batch inside an accumulation window."""
        self.position.batches += 1
        self.position.samples += self.samples_per_batch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Count the last micro-batch of a step."""
        self.on_substep_end()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Note that the epoch is over; an evaluation or a save may follow."""
        self.position.is_over = True


# How the host's loop begins at a position: what it counts epochs and steps by.


_Kind = TypeVar("_Kind")
_SIZES = ("batch", "accumulation", "world_size")
_OPEN = ("length",)
_MOST = 1 << 53


@dataclass(frozen=True)
class Batching:
    """How the samples of an epoch are divided into batches and steps.

    Attributes:
        batch: Samples in a micro-batch of one rank.
        accumulation: Micro-batches in a step.
        world_size: Number of ranks.
        length: Samples in the data set; None: nobody knows.
    """

    batch: int
    accumulation: int
    world_size: int
    length: int | None

    @property
    def samples_in_step(self) -> int:
        """Samples in a step, on all ranks together."""
        return self.batch * self.accumulation * self.world_size


@dataclass(frozen=True)
class LoopCounts:
    """What the host counts before its loop begins, in its own order."""

    num_train_epochs: int
    steps_per_epoch: int
    num_examples: int
    num_train_samples: int
    total_batch_size: int
    batches_per_epoch: int
    max_steps: int


@dataclass(frozen=True)
class StoredPosition:
    """Where in its data a checkpoint is, and how the run came there.

    Attributes:
        step: Optimizer steps so far.
        position: Where in the data.
        batching: How epochs were batched; None: nobody knows, so as now.
        shift: Steps done, less those that so much data makes as it is batched now; 0 unless the
            batching was changed.
        stopped: Whether a callback has ended the run, or the epoch.
    """

    step: int
    position: DataPosition
    batching: Batching | None
    shift: int = 0
    stopped: tuple[bool, bool] = (False, False)

    @classmethod
    def of(cls, step: int, facts: Mapping[str, Any]) -> StoredPosition:
        """Read what `facts` returned when the checkpoint was saved.

        Raises:
            CorruptCheckpointError: Nobody can have written that.
        """
        position, batching = _made(DataPosition, facts, "place"), _made(Batching, facts, "cut")
        shift, stopped = facts.get("shift"), facts.get("stopped")
        if type(shift) is not int:
            raise _odd("shift", "a number of steps", shift)
        if not isinstance(stopped, list) or [type(one) for one in stopped] != [bool, bool]:
            raise _odd("stopped", "two of true and false", stopped)
        if position.epoch > step:
            raise _odd("place.epoch", f"at most step {step}", position.epoch)
        return cls(step, position, batching, shift, (stopped[0], stopped[1]))

    def facts(self) -> dict[str, Any]:
        """Return what `of` reads."""
        return {
            **({} if self.batching is None else {"cut": to_stored(self.batching)}),
            "place": to_stored(self.position),
            "shift": self.shift,
            "stopped": [*self.stopped],
        }


def _made(kind: type[_Kind], facts: Mapping[str, Any], name: str) -> _Kind:
    """Return a fact as a dataclass, whose fields are flags, counts and sizes, all checked."""
    try:
        made: _Kind = from_stored(kind, facts[name])
    except (KeyError, TypeError, AttributeError):
        expected = f"the {name} of a run of the host's Trainer"
        raise _odd(name, expected, facts.get(name)) from None
    for key, value in vars(made).items():
        least = 1 if key in _SIZES else 0
        is_count = type(value) is int and least <= value < _MOST
        if not (type(value) is bool if key.startswith("is_") else is_count or key in _OPEN):
            raise _odd(f"{name}.{key}", f"a number from {least} on", value)
        if key in _OPEN and not (value is None or is_count):
            raise _odd(f"{name}.{key}", "a number, or null", value)
    return made


def _odd(name: str, expected: str, found: object) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"facts.{name}", expected=expected, found=brief(repr(found)))


@dataclass(frozen=True)
class LoopStart:
    """Where the host's loop begins.

    Attributes:
        epoch: The first epoch that it runs.
        batches: Batches of it that are over, as the host counts them.
        position: The same, to go on counting from.
        in_samples: Whether the rest of the epoch is dealt from a sample on.
        shift: As in `StoredPosition`.
        ends_at_once: Whether the loop has nothing left to train in this epoch.
    """

    epoch: int
    batches: int
    position: DataPosition
    in_samples: bool
    shift: int
    ends_at_once: bool


def plan_loop_start(
    stored: StoredPosition, now: Batching, counts: LoopCounts, left: int | None, *, by_epochs: bool
) -> tuple[LoopStart, LoopCounts]:
    """Return where the loop begins, and its numbers as they follow from there.

    Where the batching has not changed, the counts are the host's own.

    Args:
        stored: What the checkpoint says.
        now: How epochs are batched from now on.
        counts: What the host has counted.
        left: Batches that the samples left in the epoch give; None: nobody knows.
        by_epochs: Whether the run's length is given in epochs.
    """
    is_over = stored.position.is_over
    position = DataPosition(stored.position.epoch + 1) if is_over else replace(stored.position)
    sliced = ("batch", "world_size", "length")
    same_lists = stored.batching is None or all(
        getattr(stored.batching, name) == getattr(now, name) for name in sliced
    )
    position.is_even = position.batches == 0 or (position.is_even and same_lists)
    in_samples = not position.is_even and left is not None
    if in_samples:
        batches = max(0, counts.batches_per_epoch - (left or 0))
    else:
        batches = position.batches if position.is_even else _batches_of_stream(position, now)
    before = position.epoch * counts.steps_per_epoch + batches // now.accumulation
    changed = stored.batching is not None and stored.batching != now
    shift = stored.step - before if changed else stored.shift
    counts = _lengthened(counts, shift, by_epochs=by_epochs)
    run_ends = stored.stopped[0] or stored.step >= counts.max_steps
    empty = not is_over and (run_ends or stored.stopped[1] or batches >= counts.batches_per_epoch)
    position.batches = batches
    epoch = counts.num_train_epochs if is_over and run_ends else position.epoch
    whole = counts.steps_per_epoch * now.accumulation
    shown = max(whole, counts.batches_per_epoch) if empty else batches
    return LoopStart(epoch, shown, position, in_samples, shift, empty), counts


def _batches_of_stream(position: DataPosition, now: Batching) -> int:
    """Return how many batches of the present size the samples of a stream make."""
    size = now.batch * now.world_size
    if position.samples % size:
        what = "a stream can begin between two batches only: another size goes on inside of one"
        where = "per_device_train_batch_size"
        found = f"{position.samples} samples done"
        raise ConfigError(where, what, expected=f"a multiple of {size}", found=found)
    return position.samples // size


def _lengthened(counts: LoopCounts, shift: int, *, by_epochs: bool) -> LoopCounts:
    """Return the counts of a run whose epochs were batched otherwise before.

    Epochs that were shorter than their length says are no reason: the host counts them whole.
    """
    if by_epochs:
        return replace(counts, max_steps=counts.max_steps + shift)
    if counts.num_train_epochs == sys.maxsize:
        return counts
    needed = -(-(counts.max_steps - shift) // counts.steps_per_epoch)
    return replace(counts, num_train_epochs=max(counts.num_train_epochs, needed))
