"""Where in the data a checkpoint of the host's own Trainer is, from the little that it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unbroken.adapters.transformers.place import Place
from unbroken.adapters.transformers.reaching import Cut, Numbers, Stored
from unbroken.adapters.transformers.stock_folder import rng_files


def place_of_stock(
    folder: Path, state: Mapping[str, Any], now: Cut, numbers: Numbers, *, drop_last: bool
) -> Stored:
    """Return the place of a stock checkpoint.

    Where epochs are cut as they were, that is what the host derives from the number of steps.
    Where they are cut otherwise, which the host does not notice, it follows from the fraction of
    the epoch, the batch size and the number of ranks, all of which such a checkpoint tells.

    Args:
        folder: The checkpoint.
        state: Its trainer_state.json.
        now: How epochs are cut from now on.
        numbers: What the host has counted.
        drop_last: Whether a last batch that is smaller is left out.
    """
    step = state["global_step"]
    was = _cut_of(folder, state, now, drop_last=drop_last)
    if was is None or was == now:
        epoch, updates = divmod(step, numbers.steps_per_epoch)
        batches = updates * now.accumulation
        return Stored(step, Place(epoch, batches, batches * now.batch * now.world_size), was)
    done, whole = _batches_done(was, state, drop_last=drop_last)
    epoch, batches = divmod(done, whole)
    return Stored(step, Place(epoch, batches, batches * was.batch * was.world_size), was)


def _cut_of(folder: Path, state: Mapping[str, Any], now: Cut, *, drop_last: bool) -> Cut | None:
    """Return how epochs were cut; None: nothing in the checkpoint tells."""
    batch, epoch = state.get("train_batch_size"), state.get("epoch")
    if not isinstance(batch, int) or not isinstance(epoch, int | float) or now.length is None:
        return None
    was = replace(now, batch=batch, world_size=len(rng_files(folder)))
    done, whole = _batches_done(was, state, drop_last=drop_last)
    for accumulation in (now.accumulation, *range(1, whole + 1)):
        steps = done // whole * -(-whole // accumulation) + -(-(done % whole) // accumulation)
        if steps == state["global_step"] and done % whole % accumulation == 0:
            return replace(was, accumulation=accumulation)
    return None


def _batches_done(cut: Cut, state: Mapping[str, Any], *, drop_last: bool) -> tuple[int, int]:
    """Return how many batches each rank has done, and how many an epoch has."""
    batches = divided(cut.length or 0, cut.batch, down=drop_last)
    whole = max(1, divided(batches, cut.world_size, down=drop_last))
    return round(state["epoch"] * whole), whole


def divided(number: int, by: int, *, down: bool) -> int:
    """Return a quotient, rounded down or up.

    Example:
        >>> divided(7, 2, down=True), divided(7, 2, down=False)
        (3, 4)
    """
    return number // by if down else -(-number // by)
