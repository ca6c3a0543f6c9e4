"""Going on from a checkpoint of the host's own Trainer: it becomes one of ours."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbroken.adapters.transformers.comparing import compared, run_facts, take_effect
from unbroken.adapters.transformers.loading import unknown_order
from unbroken.adapters.transformers.losses import no_losses
from unbroken.adapters.transformers.reaching import Stored
from unbroken.adapters.transformers.stock import (
    facts_of_stock,
    load_stock,
    missing_devices_of_stock,
    refuse_what_does_not_fit,
)
from unbroken.adapters.transformers.wanted import state_of_any
from unbroken.capture import capture_rng, how_cut
from unbroken.checkpoint import Difference, ResumeReport
from unbroken.checkpoint.candidates import origin_of
from unbroken.errors import StateMismatchError

if TYPE_CHECKING:
    from unbroken.adapters.transformers.run import Run

_NOTE = "the checkpoint is one of transformers' own Trainer: it goes on as that would"


def adopt(run: Run, folder: Path, stored: Stored, loader: Any) -> tuple[ResumeReport, Any]:
    """Load a stock checkpoint and save it as one of ours, with which the run begins.

    Args:
        run: The run, whose objects the host has built.
        folder: The checkpoint.
        stored: Its place.
        loader: The loader of the training data.

    Returns:
        What was found, and the values that go on with the run.

    Raises:
        DifferenceError: The training changed, and the change is not named.
        StateMismatchError: The checkpoint does not fit the objects.
    """
    checkpointer, checkpoint = run.checkpointer, str(folder)
    if how_cut(checkpointer.objects) is not None:
        hint = "resume it once under DDP or on one process: from then on it is one of ours"
        what = "a checkpoint of transformers' own Trainer cannot be put into a sharded model"
        raise StateMismatchError(checkpoint, what, hint=hint)
    checkpointer.comparison.note_what_is_here()
    differences = _differences(run, folder, stored, loader)
    checkpointer.comparison.refuse(checkpoint, differences)
    # The host draws the order of an epoch before it brings back its random states.
    values = {"loss": no_losses(stored.step), "order": {"before": capture_rng()}, "seconds": 0.0}
    objects, rank = checkpointer.objects, run.group.rank
    run.group.together("check the checkpoint", lambda: refuse_what_does_not_fit(folder, objects))
    load_stock(folder, objects, rank=rank)
    report = ResumeReport(
        stored.step, checkpoint, run.chosen.rejected, differences=differences, notes=(_NOTE,)
    )
    take_effect(run, differences)
    came = origin_of(folder, state_of_any(folder))
    checkpointer.adopt(stored.step, values, facts=run_facts(run), came=came)
    return report, values


def _differences(run: Run, folder: Path, stored: Stored, loader: Any) -> tuple[Difference, ...]:
    facts = facts_of_stock(folder)
    found = unknown_order(loader, stored.place)
    if stored.cut is not None:
        facts["cut"] = asdict(stored.cut)
        facts["arguments"]["gradient_accumulation_steps"] = stored.cut.accumulation
        was, now = stored.cut.world_size, run.cut.world_size
        if was != now:
            effect = "sums run in another order, and dropout draws otherwise"
            found = (*found, Difference("world_size", was, now, effect, "equivalent"))
        else:
            found = (*found, *run.checkpointer.comparison.of_buckets({}))
    missing = missing_devices_of_stock(folder, rank=run.group.rank)
    if missing is not None:
        effect = "devices: what draws on them draws otherwise from here on"
        found = (*found, Difference("rng.cuda", *missing, effect, "changed"))
    return compared(run, facts, found)
